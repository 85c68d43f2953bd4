/** The pointer over a chart of steps: hover, choose a step, drag to zoom, and the line at the chosen step. */

import { nearest } from './series.js';
import { make, set } from './svg.js';
import { hideTip } from './tip.js';

/** @typedef {import('./chart.js').Chart} Chart */
/** @typedef {import('./view.js').View} View */

const LEAST = 8; // pixels; a shorter drag is a click

/**
 * Follow the pointer over a chart whose x are steps.
 * @param {Chart} chart
 * @param {View} view
 * @param {object} options
 * @param {(event: PointerEvent, step: number) => void} options.hover - with the nearest step
 * @param {string} [options.name] - of the axis of values, where that can be zoomed
 * @returns {() => void} to be called when the step has changed
 */
export function follow(chart, view, { hover, name }) {
  const { left, right, top, bottom } = chart.inner;
  const cursor = make('line', { y1: top, y2: bottom, class: 'cursor' }, chart.over);
  const place = () => {
    const x = chart.x.at(view.step);
    const isInside = x >= left - 1 && x <= right + 1;
    set(cursor, { x1: x, x2: x, visibility: isInside ? 'visible' : 'hidden' });
  };
  drag(chart, {
    hover: (event, x) => {
      const steps = view.steps;
      const index = nearest(steps, chart.x.invert(x));
      if (index >= 0) hover(event, steps[index]);
    },
    click: (x) => {
      const steps = view.steps;
      const index = nearest(steps, chart.x.invert(x));
      if (index >= 0) view.choose(steps[index]);
    },
    zoom: (xs, ys) =>
      view.change(() => {
        view.range = [chart.x.invert(xs[0]), chart.x.invert(xs[1])];
        if (ys && name) view.zooms[name] = [chart.y.invert(ys[1]), chart.y.invert(ys[0])];
      }),
    reset: () =>
      view.change(() => {
        view.range = null;
        if (name) delete view.zooms[name];
      }),
  });
  place();
  return place;
}

/**
 * Hover, click, drag and double click over the area of a chart, in pixels.
 * @param {Chart} chart
 * @param {object} on
 * @param {(event: PointerEvent, x: number, y: number) => void} on.hover
 * @param {(x: number, y: number) => void} on.click
 * @param {(xs: [number, number], ys: [number, number] | null) => void} on.zoom - ys: null for a flat rectangle
 * @param {() => void} on.reset
 */
export function drag(chart, on) {
  const { left, right, top, bottom } = chart.inner;
  const size = { x: left, y: top, width: right - left, height: bottom - top };
  const box = make('rect', { class: 'zoom', visibility: 'hidden' }, chart.over);
  const hit = make('rect', { ...size, fill: 'transparent', class: 'hit' }, chart.over);
  /** @type {[number, number] | null} */
  let start = null;
  /** @param {PointerEvent} event @returns {[number, number]} */
  const where = (event) => {
    const frame = chart.svg.getBoundingClientRect();
    const x = Math.min(Math.max(event.clientX - frame.left, left), right);
    return [x, Math.min(Math.max(event.clientY - frame.top, top), bottom)];
  };
  hit.addEventListener('pointerdown', (/** @type {PointerEvent} */ event) => {
    if (event.button !== 0) return;
    start = where(event);
    hit.setPointerCapture(event.pointerId);
  });
  hit.addEventListener('pointermove', (/** @type {PointerEvent} */ event) => {
    const [x, y] = where(event);
    if (!start) {
      on.hover(event, x, y);
      return;
    }
    hideTip();
    const isFlat = Math.abs(y - start[1]) < LEAST;
    set(box, {
      x: Math.min(x, start[0]),
      y: isFlat ? top : Math.min(y, start[1]),
      width: Math.abs(x - start[0]),
      height: isFlat ? bottom - top : Math.abs(y - start[1]),
      visibility: Math.abs(x - start[0]) < LEAST ? 'hidden' : 'visible',
    });
  });
  hit.addEventListener('pointerup', (/** @type {PointerEvent} */ event) => {
    if (!start) return;
    const [[x0, y0], [x1, y1]] = [start, where(event)];
    start = null;
    set(box, { visibility: 'hidden' });
    if (Math.abs(x1 - x0) < LEAST) on.click(x1, y1);
    else
      on.zoom(
        [Math.min(x0, x1), Math.max(x0, x1)],
        Math.abs(y1 - y0) < LEAST ? null : [Math.min(y0, y1), Math.max(y0, y1)],
      );
  });
  hit.addEventListener('pointercancel', () => {
    start = null;
    set(box, { visibility: 'hidden' });
  });
  hit.addEventListener('pointerleave', () => hideTip());
  hit.addEventListener('dblclick', () => on.reset());
}
