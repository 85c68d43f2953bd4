/** Colours: of runs, as TensorBoard deals them, and of numbers between 0 and 1. */

// TensorBoard's palette on its first page, on light and on dark.
const RUNS = [
  ['#425066', '#8e98a3'],
  ['#12b5cb', '#12b5cb'],
  ['#e52592', '#e52592'],
  ['#f9ab00', '#f9ab00'],
  ['#9334e6', '#9334e6'],
  ['#7cb342', '#7cb342'],
  ['#e8710a', '#e8710a'],
];

// Ten colours along viridis (Smith and van der Walt 2015), between which is interpolated.
const VIRIDIS = [
  [68, 1, 84],
  [72, 40, 120],
  [62, 74, 137],
  [49, 104, 142],
  [38, 130, 142],
  [31, 158, 137],
  [53, 183, 121],
  [109, 205, 89],
  [180, 222, 44],
  [253, 231, 37],
];

/**
 * @param {number} index - place of the run in TensorBoard's list
 * @param {boolean} dark
 */
export const runColour = (index, dark) => RUNS[index % RUNS.length][dark ? 1 : 0];

/**
 * @param {number} value - clipped to [0, 1]
 * @returns {number[]} red, green and blue, 0 to 255
 */
export function viridis(value) {
  const place = Math.min(Math.max(value, 0), 1) * (VIRIDIS.length - 1);
  const below = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[below].map((part, i) => Math.round(part + (place - below) * (VIRIDIS[below + 1][i] - part)));
}

/** @param {number[]} rgb */
export const css = (rgb) => `rgb(${rgb.join(',')})`;

/**
 * Colour of one of several eigenvalues; the end that cannot be read on white, or in the dark, is left out.
 * @param {number} index - from 0
 * @param {number} count
 * @param {boolean} dark
 */
export function indexColour(index, count, dark) {
  const [first, last] = dark ? [1, 0.5] : [0, 0.85];
  return css(viridis(first + (last - first) * (count > 1 ? index / (count - 1) : 0.2)));
}
