/** The box beside the pointer, with a title and a row for each value. */

import { make } from './svg.js';

/**
 * @typedef {object} Row
 * @property {string} label
 * @property {string} value
 * @property {string} [colour]
 * @property {boolean} [strong]
 * @property {boolean} [soft] - a sentence about the others
 */

/** @type {HTMLElement | null} */
let tip = null;

/**
 * @param {{clientX: number, clientY: number}} event - where the pointer is
 * @param {string} title
 * @param {Row[]} rows
 */
export function showTip(event, title, rows) {
  tip ??= /** @type {HTMLElement} */ (make('div', { id: 'tip', role: 'status' }, document.body));
  tip.replaceChildren();
  make('div', { class: 'tip-title' }, tip, title);
  for (const { colour, label, value, strong, soft } of rows) {
    const row = make('div', { class: `tip-row${strong ? ' strong' : ''}${soft ? ' soft' : ''}` }, tip);
    if (colour) make('span', { class: 'dot', style: `background:${colour}` }, row);
    make('span', { class: 'tip-label' }, row, label);
    make('span', { class: 'tip-value' }, row, value);
  }
  tip.style.display = 'block';
  const { width, height } = tip.getBoundingClientRect();
  const isRight = event.clientX + 16 + width > innerWidth;
  tip.style.left = `${Math.max(isRight ? event.clientX - width - 12 : event.clientX + 16, 2)}px`;
  tip.style.top = `${Math.max(Math.min(event.clientY + 12, innerHeight - height - 4), 2)}px`;
}

export function hideTip() {
  if (tip) tip.style.display = 'none';
}
