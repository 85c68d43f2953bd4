import assert from 'node:assert/strict';
import { test } from 'node:test';

import { Run, stateOf } from '../../../lightning_subspace/tensorboard_tab/static/run.js';

/** @param {number} step @param {object} [more] @returns {any} */
const probe = (step, more = {}) => ({ v: 1, step, outcome: 'CONVERGED', trusted: true, eigenvalues: [2, 1], ...more });

/** @param {...any} probes */
function runOf(...probes) {
  const run = new Run('a', 'subspace/probes');
  run.add(probes);
  return run;
}

test('the state of a probe', () => {
  assert.equal(stateOf(probe(0)), 'fine');
  assert.equal(stateOf(probe(0, { trusted: false })), 'undetermined');
  assert.equal(stateOf({ v: 1, step: 0, outcome: 'MAX_MATVECS', trusted: false }), 'unconverged');
  assert.equal(stateOf({ v: 1, step: 0, failed: 'RuntimeError' }), 'failed');
  assert.equal(stateOf({ v: 1, step: 0, metrics: {} }), 'fine'); // of k = 0, which asks for no space
});

test('a probe that was written twice counts once, as it was written later', () => {
  const run = runOf(probe(100), probe(0), probe(50, { eigenvalues: [9, 8] }));
  run.add([probe(50, { eigenvalues: [3, 2] }), probe(150)]);
  assert.deepEqual(run.steps, [0, 50, 100, 150]);
  assert.deepEqual(run.eigenvalue(0), [2, 3, 2, 2]);
  assert.deepEqual(run.eigenvalue(2), [null, null, null, null]);
});

test('the header of the last fit counts', () => {
  const run = runOf(probe(0, { run: { k: 5 } }), probe(50));
  assert.equal(run.k, 5);
  run.add([probe(100, { run: { k: 2 } })]);
  assert.equal(run.k, 2);
  assert.equal(runOf(probe(0), probe(50, { eigenvalues: [3, 2, 1] })).k, 3);
});

test('an overlap is the same from both sides, one with itself, and unknown where it was not measured', () => {
  const run = runOf(
    probe(0),
    probe(50, { overlaps: [[0], [0.5]] }),
    probe(100, {
      overlaps: [
        [0, 50],
        [0.2, 0],
      ],
    }),
  );
  for (const [a, b, value] of [
    [0, 50, 0.5],
    [0, 100, 0.2],
    [50, 100, 0],
  ]) {
    assert.equal(run.overlap(a, b), value);
    assert.equal(run.overlap(b, a), value);
  }
  assert.equal(run.overlap(50, 50), 1);
  assert.equal(run.overlap(0, 70), undefined);
  run.add([{ v: 1, step: 150, failed: 'RuntimeError' }]);
  assert.equal(run.overlap(150, 150), undefined);
});

test('between the spaces that are held last every pair is known', () => {
  const run = runOf(probe(0), probe(50, { overlaps: [[0], [0.5]] }), probe(100, { overlaps: [[0], [0.2]] }));
  assert.deepEqual(run.held(), [0, 100]);
  assert.ok(run.held().every((a) => run.held().every((b) => run.overlap(a, b) !== undefined)));
  run.add([probe(150, { trusted: false })]);
  assert.deepEqual(run.held(), [0, 100]);
  assert.deepEqual(runOf(probe(0)).held(), [0]);
  assert.deepEqual(runOf({ v: 1, step: 0, failed: 'RuntimeError' }).held(), []);
});

test('the probe of a step, or the last one before it, or the first', () => {
  const run = runOf(probe(10), probe(20));
  assert.equal(run.at(15), undefined);
  assert.equal(run.at(20)?.step, 20);
  assert.deepEqual(
    [0, 10, 19, 20, 99].map((step) => run.until(step)?.step),
    [10, 10, 10, 20, 20],
  );
  assert.equal(runOf().until(3), undefined);
});

test('probes of a newer schema are left out, and told', () => {
  const run = runOf(probe(0), probe(50, { v: 2 }));
  assert.deepEqual(run.steps, [0]);
  assert.ok(run.isNewer);
  assert.ok(!runOf(probe(0)).isNewer);
});

test('the loss of training, or else that of the sample', () => {
  const run = runOf(
    probe(0, { metrics: { sample_loss: 3 } }),
    probe(1, { metrics: { sample_loss: 3, training_loss: 2 } }),
    probe(2),
  );
  assert.deepEqual(run.loss(), [3, 2, null]);
  assert.deepEqual(run.keys().sort(), ['sample_loss', 'training_loss']);
  assert.equal(run.count('fine'), 3);
});

test('the layers of a step are the last ones up to it, or the first', () => {
  const layers = { groups: ['w'], participation: [1] };
  const run = runOf(probe(0), probe(10, { layers }), probe(20), probe(30, { layers }));
  assert.deepEqual(
    [0, 10, 25, 30, 99].map((step) => run.layersAt(step)?.step),
    [10, 10, 10, 30, 30],
  );
  assert.equal(runOf(probe(0)).layersAt(0), undefined);
});
