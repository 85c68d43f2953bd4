/** Several numbers of all runs in one chart: a dash and a sentence for each number, a colour for each run. */

import { steps } from './axis.js';
import { chart } from './chart.js';
import { number, thousands } from './format.js';
import { level, line } from './marks.js';
import { follow } from './pointer.js';
import { showTip } from './tip.js';

/** @typedef {import('./view.js').View} View */
/** @typedef {import('./run.js').Run} Run */

/**
 * @typedef {object} Curve
 * @property {string} metric
 * @property {string} text
 * @property {string} [dash]
 * @property {string} [says] - what it is, and how it is read
 * @property {string} [beside] - a number that is there wherever this one was looked for; at other probes it is not missing
 */

/**
 * Draw them in place of what is there.
 * @param {HTMLElement} host
 * @param {View} view
 * @param {object} options
 * @param {string} options.name - of the axis of values
 * @param {Curve[]} options.curves
 * @param {(range: [number, number]) => import('./scales.js').Scale} options.y
 * @param {string} options.yLabel
 * @param {number[]} [options.levels] - lines across the chart
 * @param {number} [options.height]
 * @param {number} [options.below]
 * @param {number} [options.left]
 * @param {(run: Run, curve: Curve, step: number) => string} [options.value] - in words
 * @returns {{frame: import('./chart.js').Chart, place: () => void}} place is to be called when the step has changed
 */
export function drawCurves(host, view, { name, curves, y, yLabel, levels = [], height, below, left, value = valueOf }) {
  const runs = view.shown;
  const frame = chart(host, { x: steps(view), y, xLabel: 'step', yLabel, height, below, left });
  for (const at of levels) level(frame, at, at ? { colour: 'var(--warn)' } : { colour: 'var(--soft)', dash: '1 0' });
  for (const { metric, dash, beside } of curves) {
    const style = { dash, width: dash ? 1.4 : 1.8, opacity: dash ? 0.85 : 1 };
    for (const run of runs) {
      const probes = run.probes.filter(({ metrics }) => !metrics || !beside || beside in metrics || metric in metrics);
      const values = probes.map(({ metrics }) => metrics?.[metric]);
      line(
        frame,
        probes.map(({ step }) => step),
        values,
        { colour: view.colour(run), ...style },
      );
    }
  }
  const place = follow(frame, view, {
    name,
    hover: (event, step) => {
      const rows = runs.flatMap((run) => {
        if (!run.at(step)) return [];
        return curves.map((curve) => ({
          colour: view.colour(run),
          label: runs.length > 1 ? `${run.name} ${curve.text}` : curve.text,
          value: value(run, curve, step),
        }));
      });
      const sentences = curves.flatMap(({ says }) => (says ? [{ label: says, value: '', soft: true }] : []));
      showTip(event, `step ${thousands(step)}`, [...rows, ...sentences]);
    },
  });
  return { frame, place };
}

/** @param {Run} run @param {Curve} curve @param {number} step */
export const valueOf = (run, { metric }, step) => number(run.at(step)?.metrics?.[metric], 4);

/**
 * Those that any run has a value of.
 * @template {Curve} T
 * @param {View} view
 * @param {T[]} curves
 * @returns {T[]}
 */
export const known = (view, curves) => {
  const keys = new Set(view.shown.flatMap((run) => run.keys()));
  return curves.filter(({ metric }) => keys.has(metric));
};

/**
 * Rows for CSV: a column for each key.
 * @param {View} view
 * @param {string[]} keys
 */
export const table = (view, keys) =>
  view.shown.flatMap((run) =>
    run.probes.map((probe) => ({
      run: run.name,
      step: probe.step,
      ...Object.fromEntries(keys.map((key) => [key, probe.metrics?.[key]])),
    })),
  );
