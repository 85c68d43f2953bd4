/** Small samples of how something is drawn, for legends. */

import { css, viridis } from './colours.js';
import { make } from './svg.js';

const HEIGHT = 10;

/**
 * A piece of a line.
 * @param {string} colour
 * @param {string} [dash]
 * @returns {SVGSVGElement}
 */
export function lineSwatch(colour, dash) {
  const svg = frame(26);
  const style = { stroke: colour, 'stroke-width': 2, 'stroke-dasharray': dash };
  make('line', { x1: 0, x2: 26, y1: HEIGHT / 2, y2: HEIGHT / 2, ...style }, svg);
  return svg;
}

/**
 * A piece of an area, or of a bar.
 * @param {string} colour
 * @param {number} [opacity]
 * @returns {SVGSVGElement}
 */
export function boxSwatch(colour, opacity = 1) {
  const svg = frame(12);
  make('rect', { width: 12, height: HEIGHT, fill: colour, opacity }, svg);
  return svg;
}

/**
 * A tick across a bar.
 * @returns {SVGSVGElement}
 */
export function tickSwatch() {
  const svg = frame(4);
  make('line', { x1: 2, x2: 2, y1: 0, y2: HEIGHT, stroke: 'var(--ink)', 'stroke-width': 2 }, svg);
  return svg;
}

/**
 * All colours of a map.
 * @returns {SVGSVGElement}
 */
export function rampSwatch() {
  const [width, count] = [80, 40];
  const svg = frame(width);
  for (let i = 0; i < count; i++) {
    const fill = css(viridis((i + 0.5) / count));
    make('rect', { x: (i * width) / count, width: width / count + 0.4, height: HEIGHT, fill }, svg);
  }
  return svg;
}

/**
 * The dot of a run.
 * @param {string} colour
 * @returns {SVGSVGElement}
 */
export function dotSwatch(colour) {
  const svg = frame(HEIGHT);
  make('circle', { cx: HEIGHT / 2, cy: HEIGHT / 2, r: HEIGHT / 2, fill: colour }, svg);
  return svg;
}

/** @param {number} width @returns {SVGSVGElement} */
const frame = (width) => make('svg', { width, height: HEIGHT, class: 'swatch', 'aria-hidden': 'true' });
