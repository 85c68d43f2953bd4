/** What is written in fewer bytes, made whole; see `schema.py`. */

/** @typedef {import('./run.js').Probe} Probe */

const PARTS = 1000; // of an overlap

/**
 * A probe as it was before it was written; one that is whole stays as it is.
 * @param {any} probe
 * @returns {Probe}
 */
export function unpacked({ packed, ...probe }) {
  /** @type {[string, any][]} */
  const metrics = Object.entries(probe.metrics ?? {});
  if (probe.metrics) {
    probe.metrics = Object.fromEntries(
      metrics.flatMap(([key, value]) =>
        typeof value === 'object' ? Object.entries(value).map(([rest, item]) => [key + rest, item]) : [[key, value]],
      ),
    );
  }
  if (packed) {
    const [differences, parts] = packed;
    let step = 0;
    probe.overlaps = [
      differences.map((/** @type {number} */ difference) => (step += difference)),
      parts.map((/** @type {number | null} */ part) => (part === null ? null : part / PARTS)),
    ];
  }
  return probe;
}
