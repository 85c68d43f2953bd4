/** Overlaps between the spaces that are held, as a map for each run. */

import { card } from '../card.js';
import { css, viridis } from '../colours.js';
import { number, thousands } from '../format.js';
import { extent, nearest } from '../series.js';
import { make, set } from '../svg.js';
import { dotSwatch } from '../swatch.js';
import { hideTip, showTip } from '../tip.js';

/** @typedef {import('../view.js').View} View */
/** @typedef {import('../run.js').Run} Run */

const MOST = 6; // runs that are drawn
const EDGE = { left: 50, right: 44, top: 8, bottom: 38 };

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function overlaps(host) {
  /** @type {View} */
  let shown;
  /** @type {((step: number) => void)[]} */
  let crosses = [];
  const { node, title, note, body } = card(host, {
    name: 'overlaps',
    title: 'Overlaps',
    isOfRuns: false,
    view: () => shown,
    lines: () => lines(shown),
  });
  node.classList.add('space');
  body.classList.add('maps');
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    const runs = view.shown.slice(0, MOST);
    body.replaceChildren();
    node.classList.toggle('wide', runs.length > 1);
    const total = Math.max(0, ...runs.map((run) => run.probes.filter((probe) => probe.trusted).length));
    const held = Math.max(0, ...runs.map((run) => run.held().length));
    title.textContent =
      held < total ? `Overlaps between ${held} of ${thousands(total)} probes` : 'Overlaps between all probes';
    note.replaceChildren();
    if (held < total) note.append('those whose spaces are held, spread over log(step); any other one: above; ');
    const error = extent([0, ...runs.flatMap((run) => run.probes.map((probe) => probe.overlap_error))])[1];
    note.append(error ? `from sketches, standard deviation at most ${number(error, 2)}` : 'exact');
    if (view.shown.length > MOST) note.append(`; the first ${MOST} of ${view.shown.length} runs`);
    const room = (Math.max(body.clientWidth, 280) - 18 * (runs.length - 1)) / Math.max(runs.length, 1);
    const size = Math.min(460, Math.max(250, room));
    crosses = runs.map((run) => map(body, view, run, size));
    for (const cross of crosses) cross(view.step);
  };
  return { draw, move: (view) => crosses.forEach((cross) => cross(view.step)) };
}

/**
 * One map; returns how to frame the row and the column of a step.
 * @param {HTMLElement} body
 * @param {View} view
 * @param {Run} run
 * @param {number} size - pixels
 * @returns {(step: number) => void}
 */
function map(body, view, run, size) {
  const box = make('div', { class: 'map' }, body);
  if (view.shown.length > 1) {
    const name = make('div', { class: 'key name' }, box);
    name.append(dotSwatch(view.colour(run)), run.name);
  }
  const held = run.held();
  if (held.length < 2) {
    make('p', {}, box, 'no two spaces to compare yet');
    return () => {};
  }
  const side = Math.floor(size - EDGE.left - EDGE.right);
  const height = side + EDGE.top + EDGE.bottom;
  const svg = make(
    'svg',
    { width: size, height, viewBox: `0 0 ${size} ${height}`, role: 'img', 'aria-label': `overlaps of ${run.name}` },
    box,
  );
  const place = { x: EDGE.left, y: EDGE.top, width: side, height: side };
  const image = {
    ...place,
    href: picture(run, held, view.dark),
    preserveAspectRatio: 'none',
    style: 'image-rendering:pixelated',
  };
  make('image', image, svg);
  labels(svg, held, side);
  bar(svg, side);
  const frames = [0, 1].map(() => make('rect', { class: 'cross' }, svg));
  const hit = make('rect', { ...place, fill: 'transparent', class: 'hit' }, svg);
  const cell = side / held.length;
  /** @param {PointerEvent} event */
  const where = (event) => {
    const corner = svg.getBoundingClientRect();
    const inside = (/** @type {number} */ pixels) => Math.min(Math.max(Math.floor(pixels / cell), 0), held.length - 1);
    const column = inside(event.clientX - corner.left - EDGE.left);
    return [held[column], held[inside(EDGE.top + side - (event.clientY - corner.top))]];
  };
  hit.addEventListener('pointermove', (/** @type {PointerEvent} */ event) => {
    const [a, b] = where(event);
    const value = run.overlap(a, b);
    const row = { label: 'overlap', value: value === undefined ? 'not compared' : number(value) };
    showTip(event, `${run.name}: step ${thousands(b)} with ${thousands(a)}`, [row]);
  });
  hit.addEventListener('pointerleave', hideTip);
  hit.addEventListener('click', (/** @type {PointerEvent} */ event) => view.choose(where(event)[1]));
  return (step) => {
    const i = nearest(held, step);
    set(frames[0], { x: EDGE.left, y: EDGE.top + side - (i + 1) * cell, width: side, height: cell });
    set(frames[1], { x: EDGE.left + i * cell, y: EDGE.top, width: cell, height: side });
  };
}

/**
 * A pixel for each pair, as the address of an image.
 * @param {Run} run
 * @param {number[]} held
 * @param {boolean} dark
 */
function picture(run, held, dark) {
  const count = held.length;
  const canvas = make('canvas', { width: count, height: count });
  const context = canvas.getContext('2d');
  const pixels = context.createImageData(count, count);
  const unknown = dark ? [92, 92, 92] : [224, 224, 224];
  for (let i = 0; i < count; i++) {
    for (let j = 0; j < count; j++) {
      const value = run.overlap(held[i], held[j]);
      const colour = value === undefined || value === null ? unknown : viridis(value);
      pixels.data.set([...colour, 255], 4 * ((count - 1 - i) * count + j));
    }
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}

/** @param {SVGElement} svg @param {number[]} held @param {number} side */
function labels(svg, held, side) {
  const cell = side / held.length;
  const every = Math.max(1, Math.ceil(held.length / Math.floor(side / 44)));
  for (let i = 0; i < held.length; i += every) {
    const middle = (i + 0.5) * cell;
    make('text', { x: EDGE.left + middle, y: EDGE.top + side + 15, 'text-anchor': 'middle' }, svg, thousands(held[i]));
    make('text', { x: EDGE.left - 4, y: EDGE.top + side - middle + 4, 'text-anchor': 'end' }, svg, thousands(held[i]));
  }
  make(
    'text',
    { x: EDGE.left + side / 2, y: EDGE.top + side + 32, 'text-anchor': 'middle', class: 'label' },
    svg,
    'step',
  );
}

/** @param {SVGElement} svg @param {number} side */
function bar(svg, side) {
  const [x, count] = [EDGE.left + side + 8, 50];
  for (let i = 0; i < count; i++) {
    const place = { x, y: EDGE.top + side - ((i + 1) * side) / count, width: 10, height: side / count + 0.6 };
    make('rect', { ...place, fill: css(viridis((i + 0.5) / count)) }, svg);
  }
  for (const [value, shift] of [
    [0, 0],
    [0.5, 4],
    [1, 9],
  ]) {
    make('text', { x: x + 13, y: EDGE.top + side * (1 - value) + shift }, svg, String(value));
  }
}

/** @param {View} view */
const lines = (view) =>
  view.shown.flatMap((run) => {
    const held = run.held();
    return held.map((a) => ({
      run: run.name,
      step: a,
      ...Object.fromEntries(held.map((b) => [`with ${b}`, run.overlap(a, b)])),
    }));
  });
