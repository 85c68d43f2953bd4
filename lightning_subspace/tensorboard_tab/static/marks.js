/** Marks in a chart: lines with gaps, error bars, levels, and what a probe left out. */

import { stateOf } from './run.js';
import { outline, segments } from './series.js';
import { make } from './svg.js';

/** @typedef {import('./chart.js').Chart} Chart */

const MOST_DOTS = 150; // probes of a line, beyond which, as on dashes, only those between two gaps have a dot

/**
 * A line through the values that are there. Nothing is drawn across a missing one.
 * @param {Chart} chart
 * @param {(number | null)[]} xs
 * @param {(number | null | undefined)[]} ys
 * @param {{colour: string, dash?: string, width?: number, opacity?: number}} style
 */
export function line(chart, xs, ys, { colour, dash, width = 1.6, opacity = 1 }) {
  const group = make('g', { opacity, class: 'series' }, chart.area);
  /** @type {[number, number][]} */
  const at = ys.map((y, i) => [chart.x.at(xs[i] ?? NaN), chart.y.at(y ?? NaN)]);
  const radius = dash || xs.length > MOST_DOTS ? 0 : 2.4;
  let path = '';
  let dots = '';
  for (const [first, last] of segments(at.map(([x, y]) => x + y))) {
    for (const i of radius ? whole(first, last) : outline(at, first, last)) {
      path += `${i === first ? 'M' : 'L'}${at[i][0].toFixed(1)} ${at[i][1].toFixed(1)}`;
      if (radius || first === last) dots += dot(at[i][0], at[i][1], radius || (xs.length > MOST_DOTS ? 1.6 : 2.4));
    }
  }
  const stroke = { stroke: colour, 'stroke-width': width, 'stroke-dasharray': dash, 'stroke-linejoin': 'round' };
  make('path', { d: path, fill: 'none', ...stroke }, group);
  if (dots) make('path', { d: dots, fill: colour }, group);
  return group;
}

/**
 * Bars from a low to a high value, where both are known.
 * @param {Chart} chart
 * @param {number[]} xs
 * @param {(number | null)[]} low
 * @param {(number | null)[]} high
 * @param {string} colour
 */
export function errorBars(chart, xs, low, high, colour) {
  let path = '';
  xs.forEach((x, i) => {
    const [from, to] = [low[i], high[i]];
    if (from === null || to === null) return;
    const [at, bottom, top] = [chart.x.at(x), chart.y.at(from), chart.y.at(to)].map((v) => v.toFixed(1));
    path += `M${at} ${bottom}V${top}m-3 0h6M${at} ${bottom}m-3 0h6`;
  });
  make('path', { d: path, fill: 'none', stroke: colour, 'stroke-width': 1.4, class: 'bars' }, chart.area);
}

/**
 * A level across the whole chart.
 * @param {Chart} chart
 * @param {number} value
 * @param {{colour: string, dash?: string}} style
 */
export function level(chart, value, { colour, dash = '8 3 2 3' }) {
  const y = chart.y.at(value);
  const { left, right } = chart.inner;
  make(
    'line',
    { x1: left, x2: right, y1: y, y2: y, stroke: colour, 'stroke-width': 1.4, 'stroke-dasharray': dash },
    chart.area,
  );
}

/**
 * The area between a low and a high value, where both are known at two neighbours; else a bar.
 * @param {Chart} chart
 * @param {number[]} xs
 * @param {(number | null)[]} low
 * @param {(number | null)[]} high
 * @param {string} colour
 */
export function band(chart, xs, low, high, colour) {
  const bottom = low.map((y, i) => [chart.x.at(xs[i]), chart.y.at(y ?? NaN)]);
  const top = high.map((y, i) => [chart.x.at(xs[i]), chart.y.at(y ?? NaN)]);
  const put = (/** @type {number[]} */ [x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`;
  for (const [first, last] of segments(bottom.map(([x, y], i) => x + y + top[i][1]))) {
    const inside = whole(first, last);
    if (first === last) errorBars(chart, [xs[first]], [low[first]], [high[first]], colour);
    const d = `M${[...inside.map((i) => put(top[i])), ...inside.reverse().map((i) => put(bottom[i]))].join('L')}Z`;
    make('path', { d, fill: colour, 'fill-opacity': 0.18, class: 'band' }, chart.area);
  }
}

/** Signs of what a probe left out. */
export const SIGNS = { undetermined: '▲', unconverged: '✕', failed: '■', withheld: '▲' };

/**
 * A row of signs below the axis, in the colour of the run, for the probes that left something out.
 * @param {Chart} chart
 * @param {import('./run.js').Run} run
 * @param {{row: number, colour: string, says: (place: {clientX: number, clientY: number} | null, probe: import('./run.js').Probe) => void, of?: (probe: import('./run.js').Probe) => keyof typeof SIGNS | 'fine'}} options
 */
export function leftOut(chart, run, { row, colour, says, of = stateOf }) {
  const y = chart.inner.bottom + 9 + 14 * row;
  for (const probe of run.probes) {
    const state = of(probe);
    if (state === 'fine') continue;
    const x = chart.x.at(probe.step);
    if (!(x >= chart.inner.left - 1 && x <= chart.inner.right + 1)) continue;
    const text = { x, y: y + 4, 'text-anchor': 'middle', class: `mark ${state}`, style: `fill:${colour}`, tabindex: 0 };
    const sign = make('text', text, chart.over, SIGNS[state]);
    sign.addEventListener('pointerenter', (/** @type {PointerEvent} */ event) => says(event, probe));
    sign.addEventListener('pointerleave', () => says(null, probe));
    sign.addEventListener('focus', () => says(middleOf(sign), probe));
    sign.addEventListener('blur', () => says(null, probe));
  }
}

/** @param {Element} node */
function middleOf(node) {
  const { left, right, top, bottom } = node.getBoundingClientRect();
  return { clientX: (left + right) / 2, clientY: (top + bottom) / 2 };
}

/** @param {number} first @param {number} last */
const whole = (first, last) => Array.from({ length: last - first + 1 }, (_, i) => first + i);

/** @param {number} x @param {number} y @param {number} r */
const dot = (x, y, r) =>
  `M${(x - r).toFixed(1)} ${y.toFixed(1)}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`;
