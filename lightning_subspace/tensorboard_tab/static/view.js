/** What is shown: runs, step, scales and choices. Panels read it; the address keeps it. */

import { runColour } from './colours.js';
import { readAddress, writeAddress } from './host.js';
import { Run } from './run.js';
import { nearest } from './series.js';

const AT_FIRST = 6; // runs that are shown before a person has chosen

/** @typedef {[number, number] | null} Range */

export class View {
  /** @param {{redraw: () => void, move: () => void}} panels - what to do when something or only the step has changed */
  constructor(panels) {
    this._panels = panels;
    /** @type {Run[]} */
    this.runs = [];
    /** @type {string[]} */
    this.order = []; // names of all runs of TensorBoard's
    /** @type {Set<string> | null} */
    this.hidden = null; // names; null before a person has chosen
    /** @type {string | null} */
    this.focus = null;
    this.tag = '';
    this.step = 0;
    this.follows = true; // the last step, as more come
    this.logarithmic = true; // eigenvalues
    this.logSteps = false;
    this.still = true; // the spectrum's axis stays over steps
    /** @type {number | null} */
    this.limit = null; // of eigenvalues
    /** @type {Range} */
    this.range = null; // of steps
    /** @type {Record<string, [number, number]>} */
    this.zooms = {}; // by axis, the values that were zoomed to
    this.shares = new Set(['gradient_fraction', 'update_fraction']);
    this.layers = new Set(['participation', 'gradient', 'update']); // shares of them that are drawn
    /** @type {Record<string, string>} */
    this.chosen = {}; // by panel, the number that is drawn
    this.dark = false;
    /** @type {number[] | null} */
    this._steps = null;
    this._read(readAddress());
  }

  get tags() {
    return [...new Set(this.runs.map((run) => run.tag))].sort();
  }

  /** Runs with probes under the chosen name. */
  get listed() {
    return this.runs.filter((run) => run.tag === this.tag);
  }

  get shown() {
    return this.listed.filter((run) => this.isVisible(run) && run.probes.length);
  }

  get focused() {
    return this.shown.find((run) => run.name === this.focus) ?? this.shown[0];
  }

  get steps() {
    this._steps ??= [...new Set(this.shown.flatMap((run) => run.steps))].sort((a, b) => a - b);
    return this._steps;
  }

  /** The largest number of eigenvalues of a run that is shown. */
  get most() {
    return Math.max(0, ...this.shown.map((run) => run.k));
  }

  /** How many eigenvalues are drawn: all of one run, the first of several, or what was asked for. */
  get count() {
    return Math.min(this.limit ?? (this.shown.length > 1 ? 1 : this.most), this.most);
  }

  /** @param {Run} run */
  isVisible(run) {
    return this.hidden ? !this.hidden.has(run.name) : this.listed.indexOf(run) < AT_FIRST;
  }

  /** @param {Run} run */
  colour(run) {
    const place = this.order.indexOf(run.name);
    return runColour(place < 0 ? this.runs.findIndex((other) => other.name === run.name) : place, this.dark);
  }

  /** Whether a part of what there is was zoomed to. */
  get isZoomed() {
    return this.range !== null || Object.keys(this.zooms).length > 0;
  }

  /** Fit what was chosen to the runs that there are now. */
  settle() {
    this._steps = null;
    if (!this.tags.includes(this.tag)) {
      const monitor = this.runs.find((run) => run.probes.length && !run.isProjection); // which has more to show
      this.tag = monitor?.tag ?? this.tags[0] ?? '';
    }
    const steps = this.steps;
    if (!steps.length) return;
    this.step = this.follows ? steps[steps.length - 1] : steps[nearest(steps, this.step)];
  }

  /** @param {number} step */
  choose(step) {
    this.step = step;
    this.follows = step === this.steps.at(-1);
    this._write();
    this._panels.move();
  }

  /**
   * Move by so many steps of probes.
   * @param {number} places
   */
  advance(places) {
    const steps = this.steps;
    if (steps.length) this.choose(steps[Math.min(Math.max(nearest(steps, this.step) + places, 0), steps.length - 1)]);
  }

  /**
   * Change anything but the step.
   * @param {(view: View) => void} change
   */
  change(change) {
    change(this);
    this.settle();
    this._write();
    this._panels.redraw();
  }

  /** @param {Run} run */
  toggle(run) {
    this.change(() => {
      this.hidden ??= new Set(this.listed.filter((other) => !this.isVisible(other)).map((other) => other.name));
      if (!this.hidden.delete(run.name)) this.hidden.add(run.name);
    });
  }

  /** @param {Run} run */
  showOnly(run) {
    this.change(() => {
      const others = this.listed.filter((other) => other !== run);
      const isAlone = this.shown.length === 1 && this.shown[0] === run;
      this.hidden = new Set(isAlone ? [] : others.map((other) => other.name));
      this.focus = run.name;
    });
  }

  /** @param {URLSearchParams} pairs */
  _read(pairs) {
    // A name may have any sign in it, so each of several has a pair of its own.
    const words = (/** @type {string} */ key) => pairs.getAll(key).filter(Boolean);
    const step = Number(pairs.get('step') ?? NaN);
    if (Number.isFinite(step)) [this.step, this.follows] = [step, false];
    if (pairs.has('hidden')) this.hidden = new Set(words('hidden'));
    if (pairs.has('shares')) this.shares = new Set(words('shares'));
    if (pairs.has('layers')) this.layers = new Set(words('layers'));
    this.focus = pairs.get('focus');
    this.tag = pairs.get('monitor') ?? '';
    this.logarithmic = pairs.get('scale') !== 'linear';
    this.logSteps = pairs.get('steps') === 'log';
    this.still = pairs.get('spectrum') !== 'fitted';
    this.limit = Number(pairs.get('eigenvalues')) || null;
    const [low, high] = (pairs.get('range') ?? '').split(',').map(Number);
    if (high > low) this.range = [low, high];
    for (const word of words('zoom')) {
      const [axis, ends] = word.split(':');
      const [from, to] = (ends ?? '').split(',').map(Number);
      if (to > from) this.zooms[axis] = [from, to];
    }
    for (const word of words('numbers')) {
      const [panel, ...key] = word.split(':');
      if (key.length) this.chosen[panel] = key.join(':');
    }
  }

  _write() {
    const pairs = new URLSearchParams();
    if (!this.follows) pairs.set('step', String(this.step));
    const put = (/** @type {string} */ key, /** @type {Iterable<string>} */ words) => {
      const all = [...words];
      for (const word of all.length ? all : ['']) pairs.append(key, word);
    };
    if (this.hidden) put('hidden', this.hidden);
    const shares = [...this.shares].sort();
    if (shares.join() !== 'gradient_fraction,update_fraction') put('shares', shares);
    if (this.layers.size < 3) put('layers', this.layers);
    if (this.focus) pairs.set('focus', this.focus);
    if (this.tags.length > 1) pairs.set('monitor', this.tag);
    if (!this.logarithmic) pairs.set('scale', 'linear');
    if (this.logSteps) pairs.set('steps', 'log');
    if (!this.still) pairs.set('spectrum', 'fitted');
    if (this.limit) pairs.set('eigenvalues', String(this.limit));
    const ends = (/** @type {[number, number]} */ of) => of.map((value) => Number(value.toPrecision(8))).join(',');
    if (this.range) pairs.set('range', ends(this.range));
    for (const [axis, zoom] of Object.entries(this.zooms)) pairs.append('zoom', `${axis}:${ends(zoom)}`);
    const numbers = Object.entries(this.chosen).map(([panel, key]) => `${panel}:${key}`);
    if (numbers.length) put('numbers', numbers);
    writeAddress(pairs);
  }
}
