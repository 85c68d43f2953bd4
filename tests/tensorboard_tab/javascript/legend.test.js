import assert from 'node:assert/strict';
import { test } from 'node:test';

import { inLines, textOf } from '../../../lightning_subspace/tensorboard_tab/static/legend.js';

/** @param {string} text - of ten pixels a letter */
const measure = (text) => 10 * text.length;

/** @param {number} width @returns {any} */
const swatch = (width) => ({ getAttribute: (/** @type {string} */ name) => (name === 'width' ? String(width) : null) });

/** @param {string} text @param {number} [width] */
const entry = (text, width) => ({ text, swatch: width === undefined ? null : swatch(width) });

test('entries stand behind each other, and none goes beyond the line', () => {
  const width = 200;
  const placed = inLines(
    ['first', 'the second', 'three', 'four', 'five'].map((text) => entry(text, 20)),
    width,
    measure,
  );
  assert.deepEqual(
    placed.map(({ text, line }) => [text, line]),
    [
      ['first', 0],
      ['the second', 1],
      ['three', 2],
      ['four', 2],
      ['five', 3],
    ],
  );
  for (const one of placed) assert.ok(textOf(one) + measure(one.text) <= width);
  assert.ok(placed[3].x >= textOf(placed[2]) + measure('three'));
  assert.equal(textOf(placed[0]), 26);
});

test('a long one goes on in the next line, with its swatch once', () => {
  const text = 'a sentence that is longer than a line, and than two of them';
  const placed = inLines([entry('key', 20), entry(text, 20), entry('last')], 200, measure);
  const parts = placed.slice(1, -1);
  assert.equal(parts.map((part) => part.text).join(' '), text);
  assert.deepEqual(
    parts.map((part) => part.swatch !== null),
    parts.map((_, i) => i === 0),
  );
  assert.ok(placed.every((part) => textOf(part) + measure(part.text) <= 200));
  assert.deepEqual(
    parts.map((part) => part.line),
    parts.map((_, i) => i + 1),
  );
});

test('a word that is longer than a line is not cut', () => {
  const placed = inLines([entry('one ' + 'x'.repeat(40) + ' two')], 200, measure);
  assert.deepEqual(
    placed.map((part) => part.text),
    ['one', 'x'.repeat(40), 'two'],
  );
  assert.deepEqual(inLines([], 200, measure), []);
});
