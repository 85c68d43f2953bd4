/** Numbers, steps and times as a person reads them. */

/**
 * A number to so many significant digits; a dash where there is none.
 * @param {number | null | undefined} value
 * @param {number} [digits]
 */
export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return '–';
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6))
    return value
      .toExponential(digits - 1)
      .replace('e+', 'e')
      .replace(/\.?0+e/, 'e');
  return String(Number(value.toPrecision(digits)));
}

/**
 * A whole number in groups of three digits.
 * @param {number} value
 */
export const thousands = (value) => value.toLocaleString('en-US');

/**
 * An eigenvalue by its index: λ with a subscript.
 * @param {number} index - from 1
 */
export const lambda = (index) => `λ${[...String(index)].map((digit) => '₀₁₂₃₄₅₆₇₈₉'[Number(digit)]).join('')}`;

/**
 * A time in the unit that suits it.
 * @param {number | null | undefined} seconds
 */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return '–';
  if (seconds < 100) return `${number(seconds, 2)} s`;
  return seconds < 5400 ? `${number(seconds / 60, 2)} min` : `${number(seconds / 3600, 2)} h`;
}

/**
 * A key of a measurement as a heading: "gradient_fraction" reads "gradient fraction".
 * @param {string} key
 */
export const heading = (key) => key.replaceAll('_', ' ');
