/** Scales from values to pixels: linear, logarithmic, and symmetric-logarithmic, with their ticks. */

/** @typedef {'linear' | 'log' | 'symlog'} Kind */

/**
 * @typedef {object} Scale
 * @property {Kind} kind
 * @property {number} low - the least value shown
 * @property {number} high - the largest value shown
 * @property {(value: number) => number} at - its position in pixels; NaN where the scale has none
 * @property {(position: number) => number} invert - the value at a position
 * @property {() => number[]} ticks
 */

/**
 * @param {Kind} kind
 * @param {[number, number]} domain - values at the ends
 * @param {[number, number]} range - pixels at the ends
 * @param {number} [edge] - below this size a symmetric scale is nearly linear
 * @returns {Scale}
 */
export function scale(kind, [low, high], [from, to], edge = 1) {
  const { forward, backward } = MAPS[kind](edge);
  const first = forward(low);
  const extent = forward(high) - first || 1;
  return {
    kind,
    low,
    high,
    at: (value) => from + ((forward(value) - first) / extent) * (to - from),
    invert: (position) => backward(first + ((position - from) / (to - from)) * extent),
    ticks: () => ticks(kind, low, high, edge),
  };
}

/**
 * The domain that shows all of some values, with a little room, and the kind of scale that can.
 * @param {Iterable<number | null | undefined>} values
 * @param {boolean} logarithmic - whether one is wanted: a symmetric one is taken where not all are positive
 * @returns {{kind: Kind, domain: [number, number], edge: number}}
 */
export function fitted(values, logarithmic) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value === null || value === undefined || !Number.isFinite(value)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) return { kind: 'linear', domain: [0, 1], edge: 1 };
  if (!logarithmic) {
    const room = 0.05 * (high - low) || 0.1 * Math.abs(high) || 1;
    return { kind: 'linear', domain: [low - room, high + room], edge: 1 };
  }
  if (low > 0) return { kind: 'log', domain: [low / 1.15, high * 1.15], edge: 1 };
  const most = Math.max(Math.abs(low), Math.abs(high)) || 1;
  const edge = 10 ** (Math.floor(Math.log10(most)) - 2);
  return { kind: 'symlog', domain: [Math.min(low * 1.2, -edge), Math.max(high * 1.2, edge)], edge };
}

/**
 * Round values inside of a domain.
 * @param {Kind} kind
 * @param {number} low
 * @param {number} high
 * @param {number} [edge]
 * @returns {number[]}
 */
export function ticks(kind, low, high, edge = 1) {
  if (low > high) return ticks(kind, high, low, edge).reverse();
  if (kind === 'linear') return linearTicks(low, high);
  if (kind === 'log') return logTicks(low, high);
  return symlogTicks(low, high, edge);
}

/** @type {Record<Kind, (edge: number) => {forward: (v: number) => number, backward: (p: number) => number}>} */
const MAPS = {
  linear: () => ({ forward: (value) => value, backward: (place) => place }),
  log: () => ({ forward: (value) => (value > 0 ? Math.log10(value) : NaN), backward: (place) => 10 ** place }),
  symlog: (edge) => ({
    forward: (value) => Math.sign(value) * Math.log10(1 + Math.abs(value) / edge),
    backward: (place) => Math.sign(place) * edge * (10 ** Math.abs(place) - 1),
  }),
};

/** @param {number} low @param {number} high */
function linearTicks(low, high) {
  if (!(high > low)) return [low];
  const rough = (high - low) / 7;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = ([1, 2, 5].find((multiple) => multiple * power >= rough) ?? 10) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(i === 0 ? 0 : Number((i * step).toPrecision(12)));
  }
  return found;
}

/** @param {number} low @param {number} high @param {number} edge */
function symlogTicks(low, high, edge) {
  if (low >= edge) return logTicks(low, high);
  if (high <= -edge)
    return logTicks(-high, -low)
      .map((tick) => -tick)
      .reverse();
  const most = Math.max(Math.abs(low), Math.abs(high));
  const within = most / edge > 500 ? [1] : [1, 2, 5];
  const sizes = [];
  for (let power = Math.ceil(Math.log10(edge) - 1e-9); 10 ** power <= most; power++) {
    sizes.push(...within.map((multiple) => Number((multiple * 10 ** power).toPrecision(3))));
  }
  const found = [...sizes.map((size) => -size).reverse(), 0, ...sizes].filter((tick) => tick >= low && tick <= high);
  return found.length > 1 ? found : linearTicks(low, high);
}

/** @param {number} low @param {number} high */
function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const within = decades > 3 ? [1] : decades > 1.2 ? [1, 2, 5] : [1, 2, 3, 4, 5, 6, 8];
  const every = Math.max(1, Math.ceil(decades / 8));
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) + 1; power++) {
    if (power % every !== 0) continue;
    for (const multiple of within) {
      const value = Number((multiple * 10 ** power).toPrecision(3));
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found.length > 1 ? found : linearTicks(low, high);
}
