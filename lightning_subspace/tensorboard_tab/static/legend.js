/** The legend of a drawing that is downloaded: what the page says around it, in lines of its width. */

import { dotSwatch } from './swatch.js';

/**
 * @typedef {object} Entry
 * @property {string} text
 * @property {SVGSVGElement | null} swatch - how it is drawn, where it is
 */

/**
 * @typedef {object} Placed
 * @property {string} text
 * @property {SVGSVGElement | null} swatch
 * @property {number} x - of the swatch, or else of the text
 * @property {number} line - from 0
 */

const AFTER_SWATCH = 6; // pixels
const BETWEEN = 14;

/**
 * What a card says above its drawing: runs by their colours, keys, what was chosen, and notes. A chip that is off is not
 * drawn, and a choice is told by the axis.
 * @param {HTMLElement} note
 * @param {[string, string][]} runs - names and colours
 * @returns {Entry[]}
 */
export function entriesOf(note, runs) {
  /** @type {Entry[]} */
  const found = runs.map(([text, colour]) => ({ text, swatch: dotSwatch(colour) }));
  let isText = false;
  for (const node of note.childNodes) {
    const wasText = isText;
    isText = node instanceof Text;
    const element = node instanceof Element ? node : null;
    if (element?.matches('select, .chip:not(.on)')) continue;
    const text = (node.textContent ?? '').trim();
    if (text && isText && wasText) found[found.length - 1].text += ` ${text}`;
    else if (text) found.push({ text, swatch: element?.querySelector('svg.swatch') ?? null });
  }
  return found;
}

/**
 * Put entries into lines; one that is longer than a line goes on in the next, without its swatch.
 * @param {Entry[]} entries
 * @param {number} width - in pixels
 * @param {(text: string) => number} measure - the width of a text
 * @returns {Placed[]}
 */
export function inLines(entries, width, measure) {
  /** @type {Placed[]} */
  const placed = [];
  let [x, line] = [0, 0];
  for (const { text, swatch } of entries) {
    const lead = swatch ? widthOf(swatch) + AFTER_SWATCH : 0;
    if (x > 0 && x + lead + measure(text) > width) [x, line] = [0, line + 1];
    let [rest, room] = [text, width - lead];
    for (let part = 0; rest; part++) {
      const piece = fitting(rest, room, measure);
      placed.push({ text: piece, swatch: part ? null : swatch, x, line });
      rest = rest.slice(piece.length).trim();
      room = width;
      x += (part ? 0 : lead) + measure(piece) + BETWEEN;
      if (rest) [x, line] = [0, line + 1];
    }
  }
  return placed;
}

/** @param {SVGSVGElement} swatch */
const widthOf = (swatch) => Number(swatch.getAttribute('width'));

/** @param {Placed} placed */
export const textOf = ({ x, swatch }) => x + (swatch ? widthOf(swatch) + AFTER_SWATCH : 0);

/**
 * As many words as fit, and one at least.
 * @param {string} text
 * @param {number} room
 * @param {(text: string) => number} measure
 */
function fitting(text, room, measure) {
  if (measure(text) <= room) return text;
  const words = text.split(' ');
  let count = words.length - 1;
  while (count > 1 && measure(words.slice(0, count).join(' ')) > room) count--;
  return words.slice(0, Math.max(count, 1)).join(' ');
}
