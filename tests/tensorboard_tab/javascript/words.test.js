import assert from 'node:assert/strict';
import { test } from 'node:test';

import {
  duration,
  heading,
  lambda,
  number,
  thousands,
} from '../../../lightning_subspace/tensorboard_tab/static/format.js';
import { verdict } from '../../../lightning_subspace/tensorboard_tab/static/panels/taken.js';
import { sentences } from '../../../lightning_subspace/tensorboard_tab/static/panels/words.js';
import { Run } from '../../../lightning_subspace/tensorboard_tab/static/run.js';

/** @param {object} probe */
function said(probe) {
  const run = new Run('a', 'subspace/probes');
  const whole = { v: 1, step: 0, trusted: true, outcome: 'CONVERGED', verified: true, ...probe };
  run.add([{ ...whole, run: { k: 10, n: 2000 } }]);
  return sentences(run.probes[0], run);
}

test('the share is told in percent, as its error bar and chance are', () => {
  const metrics = { gradient_fraction: 0.712, gradient_fraction_low: 0.69, gradient_fraction_high: 0.735 };
  assert.deepEqual(said({ metrics }), [
    '71.2 % (69 to 73.5 %) of the gradient lies in the 10 sharpest directions, 0.5 % by chance.',
  ]);
});

test('the sharpness is told with its threshold, where there is one', () => {
  assert.deepEqual(said({ eigenvalues: [21.4, 3], threshold: 20 }), [
    'λ₁ = 21.4, 1.1 of the threshold of stability 20.',
  ]);
  assert.deepEqual(said({ eigenvalues: [21.4, 3] }), ['λ₁ = 21.4.']);
  assert.deepEqual(said({ eigenvalues: [null, 3] }), []);
});

test('what has not been looked for is said', () => {
  assert.match(said({ verified: false }).join(), /missed/);
  assert.deepEqual(said({}), []);
});

test('a step is told by its change, and by what its gradient promised of that', () => {
  const step = (/** @type {number} */ gain, /** @type {number} */ change) => {
    const ratio = gain > 0 ? { 'step/edge_ratio': 1 + change / gain } : {};
    return said({ metrics: { 'step/gain': gain, 'step/change': change, ...ratio } });
  };
  assert.deepEqual(step(0.2, -0.1), [
    'The step from here lowered the loss by 0.1, 50 % of what its gradient promised.',
  ]);
  assert.deepEqual(step(0.2, 0.1), ['The step from here raised the loss by 0.1.']);
  assert.deepEqual(step(-0.2, -0.1), ['The step from here lowered the loss by 0.1.']);
  assert.deepEqual(said({ metrics: { 'step/gain': 0.2 } }), []);
});

test('an edge ratio is told by what it means, and its absence by its cause', () => {
  const told = (/** @type {Record<string, number>} */ metrics) => {
    const run = new Run('a', 'subspace/probes');
    run.add([{ v: 1, step: 0, metrics }]);
    return verdict(run, { metric: 'step/edge_ratio', text: '' }, 0);
  };
  assert.equal(told({ 'step/edge_ratio': 1.25, 'step/gain': 1 }), '1.25, the step raised the loss');
  assert.equal(told({ 'step/edge_ratio': 0.75, 'step/gain': 1 }), '0.75, the step lowered the loss');
  assert.equal(told({ 'step/gain': -1 }), '–, the step goes uphill');
  assert.equal(told({ 'step/gain': 1 }), '–');
  assert.equal(told({}), '–');
});

test('a projection says what it took away', () => {
  const run = new Run('a', 'projection/probes');
  run.add([{ v: 1, step: 0, metrics: { removed: 0.25, chi: 0.5 }, run: { keep: 'top', k: 10, n: 2000 } }]);
  assert.ok(run.isProjection);
  assert.equal(run.k, 0);
  assert.deepEqual(sentences(run.probes[0], run), [
    '25 % of the step was taken away: only what lies in the 10 sharpest directions is kept.',
    'The average of |Pg|/|g| is 0.5.',
  ]);
});

test('numbers as a person reads them', () => {
  assert.equal(number(0), '0');
  assert.equal(number(0.123456), '0.123');
  assert.equal(number(-1234567), '-1.23e6');
  assert.equal(number(4.2e-7, 2), '4.2e-7');
  assert.equal(number(1e-10), '1e-10');
  assert.equal(number(0.5004), '0.5');
  for (const value of [null, undefined, NaN, Infinity]) assert.equal(number(value), '–');
  assert.equal(thousands(1234567), '1,234,567');
  assert.equal(lambda(10), 'λ₁₀');
  assert.equal(heading('gradient_fraction'), 'gradient fraction');
});

test('times in the unit that suits them', () => {
  assert.equal(duration(0.123), '0.12 s');
  assert.equal(duration(600), '10 min');
  assert.equal(duration(7200), '2 h');
  assert.equal(duration(null), '–');
});
