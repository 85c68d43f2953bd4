/** Groups of parameters at the chosen step as bars, and their part in the top eigenvectors over the steps as a map. */

import { steps } from '../axis.js';
import { card, chip } from '../card.js';
import { chart } from '../chart.js';
import { viridis } from '../colours.js';
import { number, thousands } from '../format.js';
import { follow } from '../pointer.js';
import { extent, nearest } from '../series.js';
import { boxSwatch, rampSwatch, tickSwatch } from '../swatch.js';
import { scale } from '../scales.js';
import { make } from '../svg.js';
import { hideTip, showTip } from '../tip.js';

/** @typedef {import('../view.js').View} View */
/** @typedef {import('../run.js').Run} Run */
/** @typedef {import('../run.js').Layers} Layers */
/** @typedef {'participation' | 'gradient' | 'update'} Share */

/** @type {{share: Share, text: string, colours: [string, string], says: string}[]} */
const SHARES = [
  {
    share: 'participation',
    text: 'top eigenvectors',
    colours: ['#0072b2', '#56b4e9'],
    says: 'part of the group in the top eigenvectors',
  },
  { share: 'gradient', text: 'gradient', colours: ['#e69f00', '#e69f00'], says: '|g|² of the group, of the whole' },
  { share: 'update', text: 'update', colours: ['#009e73', '#2fc79b'], says: '|u|² of the group, of the whole' },
]; // on light and on dark, after Okabe and Ito: told apart by every kind of colour vision
const [LEAST_ROW, MOST_ROW, LEFT] = [15, 26, 170]; // pixels

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function layers(host) {
  /** @type {View} */
  let shown;
  const { node, title, note, body } = card(host, {
    name: 'layers',
    title: 'Layers',
    view: () => shown,
    isOfRuns: false,
    lines: () => lines(shown),
  });
  node.classList.add('wide');
  body.classList.add('pair');
  const [left, right] = [make('div', {}, body), make('div', {}, body)];
  let place = () => {};
  let most = 1; // of the map: it is looked for when probes are others, not at each step
  /** @param {View} view */
  const draw = (view) => {
    place = () => {};
    const run = runOf(view);
    most = run ? mostOf(run) : 1;
    right.hidden = !run?.probes.some((probe) => probe.layers?.participation);
    bars(view);
    if (run && !right.hidden) place = map(right, view, run, most);
  };
  /** @param {View} view */
  const bars = (view) => {
    shown = view;
    const run = runOf(view);
    const probe = run?.layersAt(view.step);
    node.hidden = !run || !probe?.layers;
    if (!run || !probe?.layers) return;
    title.textContent = `Layers at step ${thousands(probe.step)}${view.shown.length > 1 ? `, ${run.name}` : ''}`;
    legend(note, view, probe.layers, most);
    drawBars(left, view, probe.layers);
  };
  return {
    draw,
    move: (view) => {
      bars(view);
      place();
    },
  };
}

/**
 * The run in focus, or the first one, that has layers.
 * @param {View} view
 */
const runOf = (view) =>
  [view.focused, ...view.shown].find((run) => run?.probes.some((probe) => probe.layers !== undefined));

/**
 * The largest participation of a group, over all steps.
 * @param {Run} run
 */
const mostOf = (run) => extent(run.probes.flatMap((probe) => probe.layers?.participation ?? []))[1] || 1;

/** @param {HTMLElement} note @param {View} view @param {Layers} of @param {number} most */
function legend(note, view, of, most) {
  note.replaceChildren();
  for (const { share, text, colours, says } of SHARES) {
    if (!of[share]) continue;
    const toggle = () =>
      view.change(() => {
        if (!view.layers.delete(share)) view.layers.add(share);
      });
    chip(note, text, { isOn: view.layers.has(share), says, swatch: boxSwatch(colours[Number(view.dark)]), toggle });
  }
  if (of.null) make('span', { class: 'key' }, note).append(tickSwatch(), 'share of the parameters');
  if (of.block_sharpness) make('span', { class: 'key' }, note, 'at the right: largest eigenvalue of the group');
  if (Number.isFinite(most))
    make('span', { class: 'key' }, note).append(
      rampSwatch(),
      `map: part in the top eigenvectors, 0 to ${number(most)}`,
    );
}

/** @param {HTMLElement} host @param {View} view @param {Layers} of */
function drawBars(host, view, of) {
  const there = SHARES.filter(({ share }) => of[share] && view.layers.has(share));
  const most = extent([...there.flatMap(({ share }) => of[share] ?? []), ...(of.null ?? [])])[1];
  const top = Number.isFinite(most) && most > 0 ? most : 1;
  const frame = chart(host, {
    ...frameOf(of.groups),
    x: (range) => scale('linear', [0, top * (of.block_sharpness ? 1.22 : 1.03)], range),
    xLabel: 'share',
    yLabel: '',
  });
  const zero = frame.x.at(0);
  of.groups.forEach((group, g) => {
    const [from, to] = [frame.y.at(g + 0.12), frame.y.at(g + 0.88)];
    there.forEach(({ share, colours }, s) => {
      const value = of[share]?.[g] ?? null;
      if (value === null) return;
      const height = (to - from) / there.length;
      const place = { x: zero, y: from + s * height, width: Math.max(frame.x.at(value) - zero, 0.5), height };
      make('rect', { ...place, fill: colours[Number(view.dark)], class: `bar ${share}` }, frame.area);
    });
    const share = of.null?.[g] ?? null;
    const x = frame.x.at(share ?? NaN);
    if (share !== null)
      make(
        'line',
        { x1: x, x2: x, y1: from - 1, y2: to + 1, stroke: 'var(--ink)', 'stroke-width': 2, class: 'null' },
        frame.area,
      );
    const sharpness = of.block_sharpness?.[g] ?? null;
    const at = { x: frame.inner.right - 2, y: (from + to) / 2 + 4, 'text-anchor': 'end' };
    if (sharpness !== null) make('text', { ...at, class: 'sharpness' }, frame.over, number(sharpness));
    const row = { x: 0, y: frame.y.at(g), width: frame.inner.right, height: frame.y.at(g + 1) - frame.y.at(g) };
    const hit = make('rect', { ...row, fill: 'transparent', class: 'hit' }, frame.over);
    hit.addEventListener('pointermove', (/** @type {PointerEvent} */ event) =>
      showTip(event, group, tellOf(of, g, view.dark)),
    );
    hit.addEventListener('pointerleave', hideTip);
  });
}

/**
 * Rows from the top, one for each group.
 * @param {string[]} groups
 */
function frameOf(groups) {
  const row = Math.min(Math.max(360 / groups.length, LEAST_ROW), MOST_ROW);
  const longest = extent(groups.map((group) => group.length))[1];
  return {
    y: (/** @type {[number, number]} */ [bottom, top]) => scale('linear', [groups.length, 0], [bottom, top]),
    rows: groups,
    left: Math.min(LEFT, 30 + 7 * longest),
    height: 44 + row * groups.length, // of which 44 are the margins of a chart
  };
}

/** @param {Layers} of @param {number} g @param {boolean} dark */
function tellOf(of, g, dark) {
  const rows = SHARES.map(({ share, text, colours }) => ({
    colour: colours[Number(dark)],
    label: text,
    value: number(of[share]?.[g]),
  }));
  rows.push({ colour: '', label: 'share of the parameters', value: number(of.null?.[g]) });
  rows.push({ colour: '', label: 'largest eigenvalue of its block', value: number(of.block_sharpness?.[g]) });
  return rows.filter(({ value }) => value !== number(null));
}

/**
 * The map over the steps; returns what is to be called when the step has changed.
 * @param {HTMLElement} host
 * @param {View} view
 * @param {Run} run
 * @param {number} most - participation that has the last colour
 * @returns {() => void}
 */
function map(host, view, run, most) {
  const probes = run.probes.filter((probe) => probe.layers?.participation);
  const groups = [...new Set(probes.toReversed().flatMap((probe) => probe.layers?.groups ?? []))];
  const at = probes.map(({ layers: of }) => new Map(of?.groups.map((group, g) => [group, of.participation?.[g]])));
  const own = probes.map((probe) => probe.step);
  const frame = chart(host, { ...frameOf(groups), x: steps(view), xLabel: 'step', yLabel: '' });
  const { left, right, top, bottom } = frame.inner;
  const width = Math.max(Math.round(right - left), 1);
  const canvas = make('canvas', { width, height: groups.length });
  const context = canvas.getContext('2d');
  const pixels = context.createImageData(width, groups.length);
  const reach = own.length > 1 ? (own[own.length - 1] - own[0]) / (own.length - 1) / 2 : Infinity;
  for (let column = 0; column < width; column++) {
    const step = frame.x.invert(left + column + 0.5);
    const i = nearest(own, step);
    if (step < own[0] - reach || step > own[own.length - 1] + reach) continue; // nothing was measured there
    groups.forEach((group, g) => {
      const value = at[i].get(group);
      if (value === undefined || value === null) return;
      pixels.data.set([...viridis(value / most), 255], 4 * (g * width + column));
    });
  }
  context.putImageData(pixels, 0, 0);
  const place = { x: left, y: top, width: right - left, height: bottom - top };
  const style = { preserveAspectRatio: 'none', style: 'image-rendering:pixelated' };
  make('image', { ...place, ...style, href: canvas.toDataURL() }, frame.area);
  return follow(frame, view, {
    hover: (event, step) => {
      const i = nearest(own, step);
      const y = event.clientY - frame.svg.getBoundingClientRect().top;
      const group = groups[Math.min(Math.max(Math.floor(frame.y.invert(y)), 0), groups.length - 1)];
      showTip(event, `step ${thousands(own[i])} · ${group}`, [
        { label: 'part in the top eigenvectors', value: number(at[i].get(group)) },
      ]);
    },
  });
}

/** @param {View} view */
const lines = (view) =>
  view.shown.flatMap((run) =>
    run.probes.flatMap(({ step, layers: of }) =>
      (of?.groups ?? []).map((group, g) => ({
        run: run.name,
        step,
        group,
        participation: of?.participation?.[g],
        gradient: of?.gradient?.[g],
        update: of?.update?.[g],
        null: of?.null?.[g],
        block_sharpness: of?.block_sharpness?.[g],
      })),
    ),
  );
