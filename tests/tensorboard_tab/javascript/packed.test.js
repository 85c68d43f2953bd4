import assert from 'node:assert/strict';
import { test } from 'node:test';

import { unpacked } from '../../../lightning_subspace/tensorboard_tab/static/packed.js';

test('a probe is made whole', () => {
  const probe = {
    v: 1,
    step: 300,
    metrics: { sharpness: 2, 'noise/': { scale: 3, variance: 0 }, 'a/': { 'b/c': 1 } },
    packed: [
      [50, 50, 100],
      [1000, 3, 0],
    ],
  };
  assert.deepEqual(unpacked(probe), {
    v: 1,
    step: 300,
    metrics: { sharpness: 2, 'noise/scale': 3, 'noise/variance': 0, 'a/b/c': 1 },
    overlaps: [
      [50, 100, 200],
      [1, 0.003, 0],
    ],
  });
});

test('a probe that is whole stays as it is', () => {
  const probe = { v: 1, step: 0, metrics: { 'solver/seconds': 1 }, overlaps: [[0], [0.5]] };
  assert.deepEqual(unpacked(probe), probe);
  assert.deepEqual(unpacked({ v: 1, step: 3, failed: 'RuntimeError' }), { v: 1, step: 3, failed: 'RuntimeError' });
});
