/** A panel's card: title, notes, downloads, and the body that is drawn in. */

import { csvText, save, svgText } from './download.js';
import { make } from './svg.js';

/** @typedef {import('./view.js').View} View */
/** @typedef {Record<string, string | number | null | undefined>} Line */

/**
 * @typedef {object} Panel
 * @property {(view: View) => void} draw - everything
 * @property {(view: View) => void} move - what depends on the step alone
 */

/**
 * @typedef {object} Card
 * @property {HTMLElement} node
 * @property {HTMLElement} title
 * @property {HTMLElement} note
 * @property {HTMLElement} body
 */

/**
 * @param {HTMLElement} host
 * @param {object} options
 * @param {string} options.name - of the panel, in classes and files
 * @param {string} options.title
 * @param {(() => Line[])} options.lines - its numbers, for CSV
 * @param {boolean} [options.isTable] - without a drawing
 * @returns {Card}
 */
export function card(host, { name, title, lines, isTable = false }) {
  const node = make('section', { class: `card ${name}`, 'aria-label': title }, host);
  const head = make('header', {}, node);
  const heading = make('h3', {}, head, title);
  const body = make('div', { class: 'body' });
  const button = (/** @type {string} */ text, /** @type {string} */ says, /** @type {() => void} */ action) => {
    const made = make('button', { type: 'button', class: 'download', title: says }, head, text);
    made.addEventListener('click', action);
  };
  const file = (/** @type {string} */ suffix) => `subspace_${name}.${suffix}`;
  if (!isTable) {
    button('SVG', 'download the drawing', () => {
      const drawings = [...body.querySelectorAll('svg')];
      if (drawings.length) save(file('svg'), svgText(drawings, heading.textContent), 'image/svg+xml');
    });
  }
  button('CSV', 'download the numbers', () => save(file('csv'), csvText(lines()), 'text/csv'));
  const note = make('div', { class: 'note' }, node);
  node.appendChild(body);
  return { node, title: heading, note, body };
}

/**
 * An entry of a legend.
 * @param {HTMLElement} host
 * @param {string} text
 * @param {{colour: string, dash?: 'dashed' | 'dotted' | 'solid'}} style
 */
export function key(host, text, { colour, dash = 'solid' }) {
  const entry = make('span', { class: 'key' }, host);
  make('i', { style: `border-top-color:${colour};border-top-style:${dash}` }, entry);
  entry.append(text);
}

/**
 * A choice among words.
 * @param {HTMLElement} host
 * @param {string[]} words
 * @param {string} chosen
 * @param {string} label
 * @param {(word: string) => void} choose
 */
export function choice(host, words, chosen, label, choose) {
  const select = make('select', { 'aria-label': label }, host);
  for (const word of words) make('option', { value: word }, select, word).selected = word === chosen;
  select.addEventListener('change', () => choose(select.value));
}
