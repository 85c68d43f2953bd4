/** A panel's card: title, notes, downloads, and the body that is drawn in. */

import { csvText, save, svgText } from './download.js';
import { entriesOf } from './legend.js';
import { make } from './svg.js';
import { lineSwatch } from './swatch.js';

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
 * @param {() => View} options.view - what is drawn
 * @param {(() => Line[])} options.lines - its numbers, for CSV
 * @param {boolean} [options.isOfRuns] - whether it is drawn in the colours of runs, which a file then tells
 * @param {boolean} [options.isTable] - without a drawing
 * @returns {Card}
 */
export function card(host, { name, title, view, lines, isOfRuns = true, isTable = false }) {
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
      const drawings = [...body.querySelectorAll('svg:not(.swatch)')];
      const runs = view().shown;
      const name = runs.length === 1 ? `${runs[0].name}: ` : '';
      const dots = isOfRuns && runs.length > 1 ? runs : [];
      const entries = entriesOf(
        note,
        dots.map((run) => [run.name, view().colour(run)]),
      );
      if (drawings.length)
        save(file('svg'), svgText(drawings, `${name}${heading.textContent}`, entries, node), 'image/svg+xml');
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
 * @param {{colour: string, dash?: string}} style
 */
export function key(host, text, { colour, dash }) {
  const entry = make('span', { class: 'key' }, host);
  entry.append(lineSwatch(colour, dash), text);
}

/**
 * A button that shows or hides one of several.
 * @param {HTMLElement} host
 * @param {string} text
 * @param {{isOn: boolean, says: string, swatch: Element, toggle: () => void}} options
 */
export function chip(host, text, { isOn, says, swatch, toggle }) {
  const state = { class: isOn ? 'chip on' : 'chip', 'aria-pressed': String(isOn) };
  const button = make('button', { ...state, title: says, type: 'button', 'aria-label': text }, host);
  button.append(swatch, text);
  button.addEventListener('click', toggle);
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
