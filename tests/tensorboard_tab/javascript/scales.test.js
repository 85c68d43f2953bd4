import assert from 'node:assert/strict';
import { test } from 'node:test';

import { fitted, scale, ticks } from '../../../lightning_subspace/tensorboard_tab/static/scales.js';

/** @type {[import('../../../lightning_subspace/tensorboard_tab/static/scales.js').Kind, [number, number], number][]} */
const SCALES = [
  ['linear', [-3, 7], 1],
  ['linear', [1e6, 1e6 + 1], 1],
  ['linear', [5, 1], 1],
  ['log', [1e-3, 4e5], 1],
  ['log', [2, 3], 1],
  ['log', [100, 0.1], 1],
  ['symlog', [-50, 2e4], 100],
  ['symlog', [0, 1500], 12.5],
];

for (const [kind, [low, high], edge] of SCALES) {
  const name = `${kind} from ${low} to ${high}`;
  const made = scale(kind, [low, high], [58, 700], edge);

  test(`${name}: the ends are at the ends, and a position gives its value back`, () => {
    assert.equal(made.at(low), 58);
    assert.equal(Math.round(1e6 * made.at(high)), 700e6);
    for (let position = 58; position <= 700; position += 64.2) {
      assert.ok(Math.abs(made.at(made.invert(position)) - position) < 1e-6);
    }
  });

  test(`${name}: larger values lie further along`, () => {
    const places = Array.from({ length: 50 }, (_, i) => made.at(low + ((high - low) * i) / 49));
    assert.ok(places.every((place, i) => i === 0 || place > places[i - 1]));
  });

  test(`${name}: ticks are different, lie inside, and are two at least`, () => {
    const found = made.ticks();
    const [least, most] = [Math.min(low, high), Math.max(low, high)];
    const room = 1e-3 * (most - least);
    assert.ok(found.length >= 2 && found.length <= 30, String(found));
    assert.equal(new Set(found).size, found.length);
    for (const tick of found) assert.ok(tick >= least - room && tick <= most + room, `${tick} of ${found}`);
  });
}

test('linear ticks are multiples of 1, 2 or 5 of a power of ten', () => {
  assert.deepEqual(ticks('linear', 0, 1500), [0, 500, 1000, 1500]);
  assert.deepEqual(ticks('linear', -0.03, 1.03), [0, 0.2, 0.4, 0.6, 0.8, 1]);
  assert.deepEqual(ticks('linear', 0.1, 0.71), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]);
});

test('logarithmic ticks are powers of ten over many decades, and those between over few', () => {
  assert.deepEqual(ticks('log', 0.9, 1.1e5), [1, 10, 100, 1000, 10000, 100000]);
  assert.deepEqual(ticks('log', 0.9, 90), [1, 2, 5, 10, 20, 50]);
  assert.ok(ticks('log', 1e-30, 1e30).length < 12);
});

test('symmetric ticks have zero, and powers of ten on both sides', () => {
  assert.deepEqual(ticks('symlog', -150, 2e4, 10), [-100, -10, 0, 10, 100, 1000, 1e4]);
});

test('symmetric ticks of a part that zero does not belong to lie in it', () => {
  assert.deepEqual(ticks('symlog', 50, 2000, 10), [50, 100, 200, 500, 1000, 2000]);
  assert.deepEqual(ticks('symlog', -2000, -50, 10), [-2000, -1000, -500, -200, -100, -50]);
});

test('symmetric ticks are round, whatever the edge is', () => {
  assert.deepEqual(ticks('symlog', 0, 1500, 12.5), [0, 100, 200, 500, 1000]);
});

test('a symmetric scale within one decade has ticks, too', () => {
  const found = ticks('symlog', 310, 390, 10);
  assert.ok(found.length >= 2 && found.every((tick) => tick >= 310 && tick <= 390), String(found));
});

test('a logarithmic scale has no place for what is not positive', () => {
  const made = scale('log', [1, 10], [0, 100]);
  assert.ok(Number.isNaN(made.at(0)) && Number.isNaN(made.at(-1)));
});

test('a domain of one value is drawn, without a division by zero', () => {
  for (const kind of /** @type {const} */ (['linear', 'log', 'symlog'])) {
    const made = scale(kind, [3, 3], [0, 100]);
    assert.equal(made.at(3), 0);
    assert.deepEqual(ticks('linear', 3, 3), [3]);
    assert.ok(made.ticks().length >= 1);
  }
});

test('a fitted domain holds all values, whatever else is among them', () => {
  const cases = [[1, 2, 3], [-4, null, 9, undefined, NaN], [5], [0], [0, 0, 1e-12], [1e-9, 1e9], [-1e5, -1]];
  for (const values of cases) {
    for (const logarithmic of [false, true]) {
      const { kind, domain, edge } = fitted(values, logarithmic);
      const made = scale(kind, domain, [0, 100], edge);
      for (const value of values) {
        if (value === null || value === undefined || Number.isNaN(value)) continue;
        assert.ok(made.at(value) >= 0 && made.at(value) <= 100, `${value} of ${values} at ${made.at(value)}`);
      }
    }
  }
});

test('the kind of a fitted scale follows the signs of the values', () => {
  assert.equal(fitted([1, 2], true).kind, 'log');
  assert.equal(fitted([0, 2], true).kind, 'symlog');
  assert.equal(fitted([-1, 2], true).kind, 'symlog');
  assert.equal(fitted([1, 2], false).kind, 'linear');
  assert.deepEqual(fitted([], true), { kind: 'linear', domain: [0, 1], edge: 1 });
  assert.deepEqual(fitted([NaN, Infinity, null], false), { kind: 'linear', domain: [0, 1], edge: 1 });
});
