import assert from 'node:assert/strict';
import { test } from 'node:test';

import {
  extent,
  median,
  nearest,
  outline,
  present,
  segments,
} from '../../../lightning_subspace/tensorboard_tab/static/series.js';

test('a line is broken at every value that is missing, and nowhere else', () => {
  assert.deepEqual(segments([1, 2, null, 3, NaN, undefined, 4, 5, 6]), [
    [0, 1],
    [3, 3],
    [6, 8],
  ]);
  assert.deepEqual(segments([null, 1, null]), [[1, 1]]);
  assert.deepEqual(segments([0, 0]), [[0, 1]]); // a zero is there
  assert.deepEqual(segments([null]), []);
  assert.deepEqual(segments([]), []);
});

test('the nearest entry is that of a search through all', () => {
  const numbers = [0, 1, 4, 5, 50, 51, 1000];
  for (let value = -5; value < 1100; value += 0.7) {
    const found = numbers[nearest(numbers, value)];
    const least = Math.min(...numbers.map((other) => Math.abs(other - value)));
    assert.equal(Math.abs(found - value), least, String(value));
  }
  assert.equal(nearest([], 3), -1);
  assert.equal(nearest([7], -1e9), 0);
});

test('the outline of a line has the same ends and extremes in every column of pixels, and few points', () => {
  /** @type {[number, number][]} */
  const points = Array.from({ length: 10_000 }, (_, i) => [58 + i / 16.1, 100 * Math.sin(i * i) + Math.cos(i / 900)]);
  const kept = outline(points, 7, 9_990);
  assert.ok(kept.length <= 4 * 622);
  assert.deepEqual([kept[0], kept.at(-1)], [7, 9_990]);
  assert.ok(kept.every((index, i) => i === 0 || index > kept[i - 1]));
  /** @param {number[]} indices */
  const columns = (indices) => {
    /** @type {Map<number, number[]>} */
    const found = new Map();
    for (const i of indices) {
      const [x, y] = [Math.floor(points[i][0]), points[i][1]];
      const [first, low, high] = found.get(x) ?? [y, y, y];
      found.set(x, [first, Math.min(low, y), Math.max(high, y), y]);
    }
    return [...found];
  };
  assert.deepEqual(columns(kept), columns(points.map((_, i) => i).slice(7, 9_991)));
});

test('a line of few points is its own outline', () => {
  assert.deepEqual(
    outline(
      [
        [0, 1],
        [20, 3],
        [40, 2],
      ],
      0,
      2,
    ),
    [0, 1, 2],
  );
  assert.deepEqual(outline([[3, 3]], 0, 0), [0]);
});

test('the median counts what is there', () => {
  assert.equal(median([5, null, 1, 3, NaN]), 3);
  assert.equal(median([4, 1, 3, 2]), 3);
  assert.equal(median([10, 9, 100]), 10); // by size, not as words
  assert.equal(median([null]), null);
  assert.deepEqual(present([0, null, NaN, -1, undefined, Infinity]), [0, -1]);
});

test('the extent of more values than a call takes arguments', () => {
  const values = Array.from({ length: 600_000 }, (_, i) => i - 5);
  assert.deepEqual(extent([...values, null, NaN, undefined]), [-5, 599_994]);
  assert.deepEqual(extent([]), [Infinity, -Infinity]);
});
