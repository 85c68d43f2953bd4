/** Files of a panel: its drawing as SVG that stands alone, its numbers as CSV. */

import { inLines, textOf } from './legend.js';
import { make } from './svg.js';

const PATIENCE = 60_000; // milliseconds in which a browser has begun to save a file
const STYLES = [
  'fill',
  'stroke',
  'stroke-width',
  'stroke-dasharray',
  'opacity',
  'fill-opacity',
  'font-family',
  'font-size',
  'font-weight',
  'image-rendering',
];

/** Of the pointer and of the chosen step, which a file does not have. */
const PASSING = '.hit, .zoom, .cursor, .chosen, .cross';
const FONT = "Roboto, 'Helvetica Neue', Arial, sans-serif";
const [PAD, TITLE, LINE, TEXT] = [10, 24, 18, 12]; // pixels: around, and the heights of the title, of a line, of its text

/**
 * A drawing with the styles of the page written into it.
 * @param {SVGSVGElement} svg
 */
export function standalone(svg) {
  const copy = /** @type {SVGSVGElement} */ (svg.cloneNode(true));
  const originals = [svg, ...svg.querySelectorAll('*')];
  [copy, ...copy.querySelectorAll('*')].forEach((node, i) => {
    const computed = getComputedStyle(originals[i]);
    const styles = STYLES.map((name) => `${name}:${computed.getPropertyValue(name)}`);
    for (const name of STYLES) node.removeAttribute(name); // which may name a variable of the page
    node.setAttribute('style', styles.join(';'));
  });
  for (const node of copy.querySelectorAll(PASSING)) node.remove();
  return copy;
}

/**
 * Drawings beside each other, with their title and their legend, as one that can be read alone.
 * @param {SVGSVGElement[]} drawings
 * @param {string} title
 * @param {import('./legend.js').Entry[]} entries
 * @param {Element} card - that shows them, with its colours
 */
export function svgText(drawings, title, entries, card) {
  const { color: ink, backgroundColor: back } = getComputedStyle(card); // text of the dark mode is not read on white
  const sizes = drawings.map((svg) => ({ width: svg.width.baseVal.value, height: svg.height.baseVal.value }));
  const width = sizes.reduce((sum, size) => sum + size.width + PAD, PAD);
  const lines = inLines(entries, width - 2 * PAD, measure);
  const names = drawings.map((svg) => svg.parentElement?.querySelector('.name') ?? null);
  const top = PAD + TITLE + LINE * ((lines.at(-1)?.line ?? -1) + 1);
  const above = names.some(Boolean) ? LINE : 0;
  const height = top + above + Math.max(...sizes.map((size) => size.height)) + PAD;
  const file = make('svg', { xmlns: 'http://www.w3.org/2000/svg', width, height, viewBox: `0 0 ${width} ${height}` });
  make('title', {}, file, title);
  make('rect', { width: '100%', height: '100%', style: `fill:${back}` }, file);
  const write = (/** @type {string} */ text, /** @type {number} */ x, /** @type {number} */ y, size = TEXT) =>
    make('text', { x, y, style: `fill:${ink};font-family:${FONT};font-size:${size}px` }, file, text);
  write(title, PAD, PAD + 14, 14);
  const put = (/** @type {SVGSVGElement} */ swatch, /** @type {number} */ x, /** @type {number} */ y) => {
    card.appendChild(swatch); // the styles of an element are known where it is shown
    place(file, standalone(swatch), x, y);
    swatch.remove();
  };
  for (const entry of lines) {
    const y = PAD + TITLE + LINE * entry.line;
    if (entry.swatch) put(/** @type {SVGSVGElement} */ (entry.swatch.cloneNode(true)), PAD + entry.x, y + 2);
    write(entry.text, PAD + textOf(entry), y + TEXT);
  }
  let x = PAD;
  drawings.forEach((svg, i) => {
    if (names[i]) {
      const dot = names[i].querySelector('svg.swatch');
      if (dot) put(/** @type {SVGSVGElement} */ (dot.cloneNode(true)), x, top + 2);
      write(names[i].textContent ?? '', x + (dot ? 16 : 0), top + TEXT);
    }
    place(file, standalone(svg), x, top + above);
    x += sizes[i].width + PAD;
  });
  return new XMLSerializer().serializeToString(file);
}

/** @param {SVGSVGElement} file @param {SVGSVGElement} part @param {number} x @param {number} y */
function place(file, part, x, y) {
  part.setAttribute('x', String(x));
  part.setAttribute('y', String(y));
  file.appendChild(part);
}

/** @param {string} text */
function measure(text) {
  const context = make('canvas').getContext('2d');
  context.font = `${TEXT}px ${FONT}`;
  return context.measureText(text).width;
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
  setTimeout(() => URL.revokeObjectURL(address), PATIENCE); // a browser that is busy reads it later
}
