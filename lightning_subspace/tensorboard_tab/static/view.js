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
    this.shares = new Set(['gradient_fraction', 'update_fraction']);
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

  /** Fit what was chosen to the runs that there are now. */
  settle() {
    this._steps = null;
    if (!this.tags.includes(this.tag)) this.tag = this.tags[0] ?? '';
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
    this.focus = pairs.get('focus');
    this.tag = pairs.get('monitor') ?? '';
    this.logarithmic = pairs.get('scale') !== 'linear';
    this.logSteps = pairs.get('steps') === 'log';
    this.still = pairs.get('spectrum') !== 'fitted';
    this.limit = Number(pairs.get('eigenvalues')) || null;
    const [low, high] = (pairs.get('range') ?? '').split(',').map(Number);
    if (high > low) this.range = [low, high];
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
    if (this.focus) pairs.set('focus', this.focus);
    if (this.tags.length > 1) pairs.set('monitor', this.tag);
    if (!this.logarithmic) pairs.set('scale', 'linear');
    if (this.logSteps) pairs.set('steps', 'log');
    if (!this.still) pairs.set('spectrum', 'fitted');
    if (this.limit) pairs.set('eigenvalues', String(this.limit));
    if (this.range) pairs.set('range', this.range.map((value) => Number(value.toPrecision(6))).join(','));
    const numbers = Object.entries(this.chosen).map(([panel, key]) => `${panel}:${key}`);
    if (numbers.length) put('numbers', numbers);
    writeAddress(pairs);
  }
}
