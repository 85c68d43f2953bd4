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

/** The axis of shares and overlaps, from 0 to 1, unless zoomed into. */
export class ShareAxis {
  constructor() {
    /** @type {[number, number] | null} */
    this.zoom = null;
  }

  /** @returns {(range: [number, number]) => import('./scales.js').Scale} */
  get scale() {
    const domain = this.zoom ?? /** @type {[number, number]} */ ([-0.03, 1.03]);
    return (range) => scale('linear', domain, range);
  }
}

/** An axis that fits its values, unless zoomed into. */
export class ValueAxis {
  constructor() {
    /** @type {[number, number] | null} */
    this.zoom = null;
  }

  /**
   * @param {Iterable<number | null | undefined>} values
   * @param {boolean} [logarithmic]
   * @returns {(range: [number, number]) => import('./scales.js').Scale}
   */
  fit(values, logarithmic = false) {
    const { kind, domain, edge } = fitted(values, logarithmic);
    if (kind === 'log' && this.zoom && this.zoom[0] <= 0) this.zoom = null; // of a linear axis: it has no place here
    return (range) => scale(kind, this.zoom ?? domain, range, edge);
  }
}
