/** Axes that panels share: steps, with what was zoomed to; shares; values with a zoom of their own. */

import { fitted, scale } from './scales.js';

/** @typedef {import('./view.js').View} View */

/**
 * The axis of steps.
 * @param {View} view
 * @returns {(range: [number, number]) => import('./scales.js').Scale}
 */
export function steps(view) {
  const all = view.steps;
  const first = all[0] ?? 0;
  const last = all[all.length - 1] ?? 1;
  const spacing = all.length > 1 ? (last - first) / (all.length - 1) : 1;
  const [low, high] = view.range ?? [first, last > first ? last : first + spacing];
  if (!view.logSteps) {
    const room = 0.02 * (high - low);
    return (range) => scale('linear', [low - room, high + room], range);
  }
  // Step 0 is shown, too: linear up to the distance of two probes.
  return (range) => scale('symlog', [low, high * 1.02], range, Math.max(spacing / 4, 1));
}

/**
 * The axis of shares and overlaps, from 0 to 1, unless zoomed into.
 * @param {View} view
 * @param {string} name - of the axis, among those that can be zoomed
 * @returns {(range: [number, number]) => import('./scales.js').Scale}
 */
export function shareAxis(view, name) {
  return (range) => scale('linear', view.zooms[name] ?? [-0.03, 1.03], range);
}

/**
 * An axis that fits its values, unless zoomed into.
 * @param {View} view
 * @param {string} name - of the axis, among those that can be zoomed
 * @param {Iterable<number | null | undefined>} values
 * @param {boolean} [logarithmic]
 * @returns {(range: [number, number]) => import('./scales.js').Scale}
 */
export function valueAxis(view, name, values, logarithmic = false) {
  const { kind, domain, edge } = fitted(values, logarithmic);
  const zoom = view.zooms[name];
  // What was zoomed to on a linear axis may have no place on a logarithmic one.
  const shown = zoom && (kind !== 'log' || zoom[0] > 0) ? zoom : domain;
  return (range) => scale(kind, shown, range, edge);
}
