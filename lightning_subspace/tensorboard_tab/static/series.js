/** Series of values over steps, in which any may be missing. */

/** @typedef {(number | null | undefined)[]} Values */

/**
 * Runs of neighbours that are all there: a line is drawn within each, and none between two of them.
 * @param {Values} values
 * @returns {[number, number][]} first and last index of each
 */
export function segments(values) {
  /** @type {[number, number][]} */
  const found = [];
  let start = -1;
  for (let i = 0; i <= values.length; i++) {
    const isThere = i < values.length && Number.isFinite(values[i] ?? NaN);
    if (isThere && start < 0) start = i;
    if (!isThere && start >= 0) {
      found.push([start, i - 1]);
      start = -1;
    }
  }
  return found;
}

/**
 * Indices of those points of a line that make its picture: of many within a column of pixels the first, the last, the
 * lowest and the highest (Jugel et al. 2014, M4). Nothing else of them is seen.
 * @param {[number, number][]} points - in pixels
 * @param {number} first - index
 * @param {number} last - index
 * @returns {number[]}
 */
export function outline(points, first, last) {
  const kept = [];
  for (let i = first; i <= last; i++) {
    const column = Math.floor(points[i][0]);
    let [low, high, end] = [i, i, i];
    while (end < last && Math.floor(points[end + 1][0]) === column) {
      end++;
      if (points[end][1] < points[low][1]) low = end;
      if (points[end][1] > points[high][1]) high = end;
    }
    kept.push(...new Set([i, Math.min(low, high), Math.max(low, high), end]));
    i = end;
  }
  return kept;
}

/**
 * Index of the entry nearest to a value in ascending numbers; -1 where there are none.
 * @param {number[]} numbers
 * @param {number} value
 */
export function nearest(numbers, value) {
  let low = 0;
  let high = numbers.length - 1;
  if (high < 0) return -1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - numbers[low - 1] < numbers[low] - value ? low - 1 : low;
}

/**
 * The middle one of those values that are there, the upper one of two; null where there are none.
 * @param {Values} values
 */
export function median(values) {
  const known = present(values).sort((a, b) => a - b);
  return known.length ? known[known.length >> 1] : null;
}

/**
 * The least and the largest of those values that are there, of any number; infinite, and crossed, where there are none.
 * @param {Values} values
 * @returns {[number, number]}
 */
export function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of present(values)) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/**
 * Those values that are there.
 * @param {Values} values
 * @returns {number[]}
 */
export const present = (values) =>
  /** @type {number[]} */ (values.filter((value) => value !== null && value !== undefined && Number.isFinite(value)));
