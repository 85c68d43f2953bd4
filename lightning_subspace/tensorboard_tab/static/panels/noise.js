/** The noise of the gradient as a number of examples, in all directions and outside and inside of the top space. */

import { valueAxis } from '../axis.js';
import { card, key } from '../card.js';
import { drawCurves, known, table } from '../curves.js';
import { number, thousands } from '../format.js';
import { band, leftOut, SIGNS } from '../marks.js';
import { boxSwatch } from '../swatch.js';
import { make } from '../svg.js';
import { hideTip, showTip } from '../tip.js';

/** @typedef {import('../view.js').View} View */
/** @typedef {import('../run.js').Run} Run */
/** @typedef {import('../run.js').Probe} Probe */

const [SCALE, LOW, HIGH] = ['noise/scale', 'noise/scale_low', 'noise/scale_high'];
const CURVES = [
  {
    metric: SCALE,
    text: 'all directions',
    beside: 'noise/variance',
    says: 'noise scale: so many examples, averaged, have as much noise as gradient; a larger batch helps up to about there',
  },
  {
    metric: 'noise/scale_bulk',
    text: 'outside of the top space',
    beside: 'noise/variance_bulk',
    dash: '5 3',
    says: 'outside of the top space: steadier than the whole, since oscillations lie inside',
  },
  {
    metric: 'noise/scale_top',
    text: 'inside',
    beside: 'noise/variance_top',
    dash: '2 3',
    says: 'inside: of the gradient in the top space',
  },
];

const WHOLE = CURVES[0];

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function noise(host) {
  /** @type {View} */
  let shown;
  let place = () => {};
  const { node, note, body } = card(host, {
    name: 'noise',
    title: 'Noise of the gradient',
    view: () => shown,
    lines: () => table(shown, keysOf(shown)),
  });
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    const runs = view.shown;
    node.hidden = !runs.some(isMeasured);
    note.replaceChildren();
    place = () => {};
    if (node.hidden) return;
    const curves = known(view, CURVES);
    for (const { text, dash } of curves) key(note, text, { colour: 'currentColor', dash });
    if (runs.some((run) => run.metric(HIGH).some((value) => value !== null)))
      make('span', { class: 'key' }, note).append(boxSwatch('currentColor', 0.25), 'error');
    const lacking = runs.filter((run) => run.probes.some((probe) => isWithheld(probe, WHOLE)));
    const count = lacking.reduce((sum, run) => sum + run.probes.filter((probe) => isWithheld(probe, WHOLE)).length, 0);
    if (count) make('span', { class: 'warn' }, note, `${SIGNS.withheld} ${count} withheld`);
    const values = runs.flatMap((run) =>
      [...CURVES.map(({ metric }) => metric), LOW, HIGH].flatMap((m) => run.metric(m)),
    );
    const drawn = drawCurves(body, view, {
      name: 'noise',
      curves,
      y: valueAxis(view, 'noise', values, true),
      yLabel: 'noise scale, in examples',
      left: 68,
      height: 280 + 14 * lacking.length,
      below: 14 * lacking.length + (lacking.length ? 4 : 0),
      value: (run, curve, step) => inWords(run.at(step), curve),
    });
    place = drawn.place;
    for (const run of runs) band(drawn.frame, run.steps, run.metric(LOW), run.metric(HIGH), view.colour(run));
    lacking.forEach((run, row) =>
      leftOut(drawn.frame, run, {
        row,
        colour: view.colour(run),
        of: (probe) => (isWithheld(probe, WHOLE) ? 'withheld' : 'fine'),
        says: (event, probe) => {
          if (!event) return hideTip();
          showTip(event, `${run.name} · step ${thousands(probe.step)} · withheld`, [
            { label: why(run, probe), value: '' },
          ]);
        },
      }),
    );
  };
  return { draw, move: () => place() };
}

/** @param {Run} run */
const isMeasured = (run) => run.keys().some((key) => key.startsWith('noise/scale'));

/** @param {View} view */
const keysOf = (view) =>
  [...new Set(view.shown.flatMap((run) => run.keys()))].filter((name) => name.startsWith('noise/')).sort();

/**
 * Whether a number was looked for, and the sample was too small for it.
 * @param {Probe | undefined} probe
 * @param {import('../curves.js').Curve} curve
 */
const isWithheld = (probe, { metric, beside = '' }) =>
  probe?.metrics?.[metric] === undefined &&
  (probe?.metrics?.[beside] !== undefined || probe?.metrics?.[`${metric}_low`] !== undefined);

/** @param {Run} run @param {Probe} probe */
function why(run, probe) {
  const size = run.header.gradient_sample ?? run.header.sample;
  const low = probe.metrics?.[LOW];
  const bound = low === undefined ? '' : `; it is above ${number(low)}`;
  return `the sample${size ? ` of ${thousands(size)} examples` : ''} is too small to tell the gradient from its noise${bound}`;
}

/** @param {Probe | undefined} probe @param {import('../curves.js').Curve} curve */
function inWords(probe, curve) {
  const { metric } = curve;
  const [low, high] = [probe?.metrics?.[`${metric}_low`], probe?.metrics?.[`${metric}_high`]];
  if (isWithheld(probe, curve)) return `withheld${low === undefined ? '' : `, above ${number(low)}`}`;
  const bar = low !== undefined && high !== undefined ? ` (${number(low)} to ${number(high)})` : '';
  return number(probe?.metrics?.[metric]) + bar;
}
