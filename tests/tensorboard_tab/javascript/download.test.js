import assert from 'node:assert/strict';
import { test } from 'node:test';

import { csvText } from '../../../lightning_subspace/tensorboard_tab/static/download.js';

test('columns are the keys of all rows; what is missing is empty', () => {
  const text = csvText([
    { run: 'a', step: 0, value: null },
    { run: 'b', step: 50, other: 1e-7, value: undefined },
  ]);
  assert.equal(text, 'run,step,value,other\r\na,0,,\r\nb,50,,1e-7\r\n');
});

test('what RFC 4180 asks to be quoted is, and nothing else', () => {
  const text = csvText([{ 'a,b': 'say "x"', c: 'two\nlines', d: ' plain; λ₁ ', e: 'a\rb' }]);
  assert.equal(text, '"a,b",c,d,e\r\n"say ""x""","two\nlines", plain; λ₁ ,"a\rb"\r\n');
});
