/** The frame of a chart: two axes with their grid, and the area to draw in. */

import { number, thousands } from './format.js';
import { make } from './svg.js';

/** @typedef {import('./scales.js').Scale} Scale */

/**
 * @typedef {object} Chart
 * @property {SVGSVGElement} svg
 * @property {SVGGElement} area - clipped to the axes
 * @property {SVGGElement} over - not clipped
 * @property {Scale} x
 * @property {Scale} y
 * @property {{left: number, right: number, top: number, bottom: number}} inner - the edges of the area
 * @property {number} height
 */

const MARGIN = { left: 58, right: 14, top: 8, bottom: 36 };
const LETTER = 6.6; // pixels of one, on average
let count = 0;

/**
 * Draw axes into an element, in place of what is in it.
 * @param {HTMLElement} host
 * @param {object} options
 * @param {(range: [number, number]) => Scale} options.x
 * @param {(range: [number, number]) => Scale} options.y
 * @param {string} options.xLabel
 * @param {string} options.yLabel
 * @param {number} [options.height] - in pixels
 * @param {number} [options.below] - pixels between the area and the labels of x, for marks
 * @param {number[] | null} [options.xTicks] - in place of round values
 * @param {string[] | null} [options.rows] - names of rows from the top, in place of values of y
 * @param {number} [options.left] - pixels before the area
 * @returns {Chart}
 */
export function chart(
  host,
  { x, y, xLabel, yLabel, height = 280, below = 0, xTicks = null, rows = null, left = MARGIN.left },
) {
  host.replaceChildren();
  const width = Math.max(host.clientWidth, 240);
  const inner = {
    left,
    right: width - MARGIN.right,
    top: MARGIN.top,
    bottom: height - MARGIN.bottom - below,
  };
  const svg = make(
    'svg',
    { width, height, viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': yLabel },
    host,
  );
  const scaleX = x([inner.left, inner.right]);
  const scaleY = y([inner.bottom, inner.top]);
  const clip = `area${count++}`;
  const size = { width: inner.right - inner.left, height: inner.bottom - inner.top + 4 };
  make('rect', { x: inner.left, y: inner.top - 2, ...size }, make('clipPath', { id: clip }, svg));
  const axes = make('g', { class: 'axes' }, svg);
  const label = (/** @type {number} */ tick) =>
    Number.isInteger(tick) && Math.abs(tick) < 1e6 ? thousands(tick) : number(tick);
  let last = Infinity;
  rows?.forEach((name, i) => {
    const room = Math.floor((left - 22) / LETTER);
    const shown = name.length > room ? `…${name.slice(name.length - room + 1)}` : name; // their ends tell them apart
    const at = { x: left - 6, y: scaleY.at(i + 0.5) + 4, 'text-anchor': 'end', class: 'row' };
    make('title', {}, make('text', at, axes, shown), name);
  });
  for (const tick of rows ? [] : scaleY.ticks()) {
    const at = scaleY.at(tick);
    if (!(at >= inner.top - 1 && at <= inner.bottom + 1)) continue;
    make('line', { x1: inner.left, x2: inner.right, y1: at, y2: at, class: 'grid' }, axes);
    if (Math.abs(at - last) < 14) continue;
    last = at;
    make('text', { x: inner.left - 6, y: at + 4, 'text-anchor': 'end' }, axes, label(tick));
  }
  last = -Infinity;
  for (const tick of xTicks ?? scaleX.ticks()) {
    const at = scaleX.at(tick);
    if (!(at >= inner.left - 1 && at <= inner.right + 1)) continue;
    make('line', { x1: at, x2: at, y1: inner.top, y2: inner.bottom, class: 'grid' }, axes);
    if (Math.abs(at - last) < (xTicks ? 16 : 44)) continue;
    last = at;
    make('text', { x: at, y: inner.bottom + 16 + below, 'text-anchor': 'middle' }, axes, label(tick));
  }
  const middle = (inner.left + inner.right) / 2;
  make('text', { x: middle, y: height - 3, 'text-anchor': 'middle', class: 'label' }, axes, xLabel);
  const turned = `translate(12 ${(inner.top + inner.bottom) / 2}) rotate(-90)`;
  make('text', { transform: turned, 'text-anchor': 'middle', class: 'label' }, axes, yLabel);
  const area = make('g', { 'clip-path': `url(#${clip})` }, svg);
  return { svg, area, over: make('g', {}, svg), x: scaleX, y: scaleY, inner, height };
}
