/** Files of a panel: its drawing as SVG that stands alone, its numbers as CSV. */

import { make } from './svg.js';

const STYLES = [
  'fill',
  'stroke',
  'stroke-width',
  'stroke-dasharray',
  'opacity',
  'font-family',
  'font-size',
  'image-rendering',
];

/**
 * A drawing with the styles of the page written into it.
 * @param {SVGSVGElement} svg
 * @param {string} title
 */
export function standalone(svg, title) {
  const copy = /** @type {SVGSVGElement} */ (svg.cloneNode(true));
  const originals = [svg, ...svg.querySelectorAll('*')];
  [copy, ...copy.querySelectorAll('*')].forEach((node, i) => {
    const computed = getComputedStyle(originals[i]);
    const styles = STYLES.map((name) => `${name}:${computed.getPropertyValue(name)}`);
    for (const name of STYLES) node.removeAttribute(name); // which may name a variable of the page
    node.setAttribute('style', styles.join(';'));
  });
  for (const node of copy.querySelectorAll('.hit, .zoom')) node.remove();
  copy.setAttribute('xmlns', 'http://www.w3.org/2000/svg');
  const card = svg.closest('.card'); // text of the dark mode is not read on white
  const back = make('rect', { width: '100%', height: '100%' });
  back.setAttribute('style', `fill:${card ? getComputedStyle(card).backgroundColor : 'white'}`);
  copy.prepend(back);
  copy.insertAdjacentHTML('afterbegin', '<title></title>');
  /** @type {Element} */ (copy.firstElementChild).textContent = title;
  return copy;
}

/**
 * Several drawings beside each other, as one.
 * @param {SVGSVGElement[]} drawings
 * @param {string} title
 */
export function svgText(drawings, title) {
  if (drawings.length === 1) return new XMLSerializer().serializeToString(standalone(drawings[0], title));
  let x = 0;
  const height = Math.max(...drawings.map((svg) => svg.height.baseVal.value));
  const inside = drawings.map((svg) => {
    const copy = standalone(svg, title);
    copy.setAttribute('x', String(x));
    x += svg.width.baseVal.value + 12;
    return new XMLSerializer().serializeToString(copy);
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${x}" height="${height}">${inside.join('')}</svg>`;
}

/**
 * Rows as CSV, by RFC 4180; the columns are the keys of all rows.
 * @param {Record<string, string | number | null | undefined>[]} rows
 */
export function csvText(rows) {
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  /** @param {string | number | null | undefined} value */
  const cell = (value) => {
    const text = value === null || value === undefined ? '' : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = [columns.map(cell), ...rows.map((row) => columns.map((column) => cell(row[column])))];
  return lines.map((line) => `${line.join(',')}\r\n`).join('');
}

/**
 * Hand a text to the browser as a file.
 * @param {string} name
 * @param {string} text
 * @param {string} type
 */
export function save(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement('a');
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
