/**
 * One run: its probes by step, and what can be asked of them.
 *
 * A probe that was written twice, as by a run that is resumed, counts once: the later one.
 */

import { extent } from './series.js';

/**
 * @typedef {object} Probe - as it is written; what is absent is not known
 * @property {number} v - version of the schema
 * @property {number} step
 * @property {string} [failed] - the exception that ended it
 * @property {string} [outcome] - of the solver, in its own word
 * @property {boolean} [trusted] - whether its space is determined
 * @property {boolean} [verified]
 * @property {string} [reason] - why values were left out
 * @property {(number | null)[]} [eigenvalues]
 * @property {(number | null)[]} [residuals]
 * @property {number} [next] - estimate of eigenvalue k + 1
 * @property {Record<string, number>} [metrics]
 * @property {[number[], number[]]} [overlaps] - steps of held spaces, and the overlaps with them
 * @property {number} [overlap_error]
 * @property {[number[], number[]]} [density] - values, and the spectral density there
 * @property {Layers} [layers]
 * @property {number} [threshold]
 * @property {number} [lr]
 * @property {number} [passed_over]
 * @property {Record<string, any>} [run] - what was asked for, at the first probe of a fit
 */

/**
 * @typedef {object} Layers - of each group of parameters, a share in [0, 1] where nothing else is said
 * @property {string[]} groups
 * @property {(number | null)[]} [participation] - of the top eigenvectors
 * @property {(number | null)[]} [gradient]
 * @property {(number | null)[]} [update]
 * @property {(number | null)[]} [null] - of all parameters: what the others are without a preference
 * @property {(number | null)[]} [block_sharpness] - largest eigenvalue of the group's own block
 */

/** @typedef {'fine' | 'undetermined' | 'unconverged' | 'failed'} State */

export const SCHEMA = 1;

/** What a probe in each state leaves out. */
export const STATES = {
  fine: 'everything is there',
  undetermined: 'the space is not determined: shares and overlaps are left out',
  unconverged: 'the solver did not converge: everything is left out',
  failed: 'the probe failed',
};

/**
 * How much of a probe can be believed.
 * @param {Probe} probe
 * @returns {State}
 */
export function stateOf(probe) {
  if (probe.failed) return 'failed';
  if (!probe.outcome || probe.trusted) return 'fine';
  return probe.eigenvalues ? 'undetermined' : 'unconverged';
}

export class Run {
  /** @param {string} name @param {string} tag */
  constructor(name, tag) {
    this.name = name;
    this.tag = tag;
    /** @type {Probe[]} */
    this.probes = [];
    /** @type {number[]} */
    this.steps = [];
    /** @type {Record<string, any>} */
    this.header = {};
    this.isNewer = false; // than this page understands
    this.last = 0; // wall time of the last probe
    /** @type {Map<number, Map<number, number>>} */
    this._overlaps = new Map(); // by one step and the other, in both orders
  }

  /**
   * Take further probes.
   * @param {Probe[]} found
   */
  add(found) {
    const known = new Map(this.probes.map((probe) => [probe.step, probe]));
    for (const probe of found) {
      if (probe.v > SCHEMA) {
        this.isNewer = true;
        continue;
      }
      known.set(probe.step, probe);
      if (probe.run) this.header = probe.run;
      const [others, values] = probe.overlaps ?? [[], []];
      others.forEach((other, i) => {
        this._row(probe.step).set(other, values[i]);
        this._row(other).set(probe.step, values[i]);
      });
    }
    this.probes = [...known.values()].sort((a, b) => a.step - b.step);
    this.steps = this.probes.map((probe) => probe.step);
  }

  /** Whether it tells what a projection did, and nothing of a space. */
  get isProjection() {
    return this.header.keep !== undefined;
  }

  /** How many eigenvalues its probes have. */
  get k() {
    if (this.isProjection) return 0;
    return this.header.k ?? extent([0, ...this.probes.map((probe) => probe.eigenvalues?.length)])[1];
  }

  /** @param {number} step */
  at(step) {
    const index = before(this.steps, step);
    return this.steps[index] === step ? this.probes[index] : undefined;
  }

  /**
   * The last probe up to a step, or the first one.
   * @param {number} step
   */
  until(step) {
    return this.probes[Math.max(before(this.steps, step), 0)];
  }

  /**
   * Overlap of the spaces at two steps; undefined where they were not compared.
   * @param {number} a
   * @param {number} b
   */
  overlap(a, b) {
    if (a !== b) return this._overlaps.get(a)?.get(b);
    return this.at(a)?.trusted ? 1 : undefined;
  }

  /**
   * All overlaps that are known with the space at a step, in the order of the others.
   * @param {number} step
   * @returns {[number, number][]}
   */
  overlapsWith(step) {
    /** @type {[number, number][]} */
    const own = this.at(step)?.trusted ? [[step, 1]] : [];
    return [...own, ...(this._overlaps.get(step) ?? [])].sort(([a], [b]) => a - b);
  }

  /** The steps whose spaces were held at the last probe: between these every pair is known. */
  held() {
    const last = this.probes.findLast((probe) => probe.trusted && probe.overlaps);
    const alone = last ?? this.probes.find((probe) => probe.trusted);
    return alone ? [...(alone.overlaps?.[0] ?? []), alone.step].sort((a, b) => a - b) : [];
  }

  /** @param {number} step */
  _row(step) {
    const row = this._overlaps.get(step) ?? new Map();
    this._overlaps.set(step, row);
    return row;
  }

  /** @param {string} key */
  metric(key) {
    return this.probes.map((probe) => probe.metrics?.[key] ?? null);
  }

  /** @param {number} index - from 0 */
  eigenvalue(index) {
    return this.probes.map((probe) => probe.eigenvalues?.[index] ?? null);
  }

  next() {
    return this.probes.map((probe) => probe.next ?? null);
  }

  threshold() {
    return this.probes.map((probe) => probe.threshold ?? null);
  }

  /** The loss of training at each probe: its running mean, or else that of the sample. */
  loss() {
    return this.probes.map(lossOf);
  }

  /**
   * The last probe up to a step that has layers, or the first one.
   * @param {number} step
   */
  layersAt(step) {
    const is = (/** @type {Probe} */ probe) => probe.layers !== undefined;
    return this.probes.findLast((probe) => is(probe) && probe.step <= step) ?? this.probes.find(is);
  }

  /** @param {State} state */
  count(state) {
    return this.probes.filter((probe) => stateOf(probe) === state).length;
  }

  /** All keys of its numbers. */
  keys() {
    return [...new Set(this.probes.flatMap((probe) => Object.keys(probe.metrics ?? {})))];
  }
}

/**
 * The loss of training at a probe, or else that of its sample.
 * @param {Probe} probe
 */
export const lossOf = ({ metrics }) => metrics?.training_loss ?? metrics?.sample_loss ?? null;

/**
 * Index of the last of ascending numbers that is not above a value; -1 where all are.
 * @param {number[]} numbers
 * @param {number} value
 */
function before(numbers, value) {
  let [low, high] = [0, numbers.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}
