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
    says: 'noise scale: so many examples, averaged, have as much noise as gradient; a larger batch helps up to about there',
  },
  {
    metric: 'noise/scale_bulk',
    text: 'outside of the top space',
    dash: '5 3',
    says: 'outside of the top space: steadier than the whole, since oscillations lie inside',
  },
  { metric: 'noise/scale_top', text: 'inside', dash: '2 3', says: 'inside: of the gradient in the top space' },
];

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function noise(host) {
  /** @type {View} */
  let shown;
  let place = () => {};
  const { node, note, body } = card(host, {
    name: 'noise',
    title: 'Noise of the gradient',
    view: () => shown,
    lines: () => table(shown, [SCALE, LOW, HIGH, ...CURVES.slice(1).map(({ metric }) => metric)]),
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
    const lacking = runs.filter((run) => run.probes.some((probe) => isWithheld(run, probe)));
    const count = lacking.reduce((sum, run) => sum + run.probes.filter((probe) => isWithheld(run, probe)).length, 0);
    if (count) make('span', { class: 'warn' }, note, `${SIGNS.withheld} ${count} withheld`);
    const values = runs.flatMap((run) =>
      [...CURVES.map(({ metric }) => metric), LOW, HIGH].flatMap((m) => run.metric(m)),
    );
    const drawn = drawCurves(body, view, {
      name: 'noise',
      curves,
      y: valueAxis(view, 'noise', values, true),
      yLabel: 'noise scale, in examples',
      height: 280 + 14 * lacking.length,
      below: 14 * lacking.length + (lacking.length ? 4 : 0),
      value: (run, { metric }, step) => inWords(run.at(step), metric),
    });
    place = drawn.place;
    for (const run of runs) band(drawn.frame, run.steps, run.metric(LOW), run.metric(HIGH), view.colour(run));
    lacking.forEach((run, row) =>
      leftOut(drawn.frame, run, {
        row,
        colour: view.colour(run),
        of: (probe) => (isWithheld(run, probe) ? 'withheld' : 'fine'),
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

/**
 * Whether a probe has measured the noise and gives no number.
 * @param {Run} run
 * @param {Probe} probe
 */
const isWithheld = (run, probe) => isMeasured(run) && probe.metrics !== undefined && probe.metrics[SCALE] === undefined;

/** @param {Run} run @param {Probe} probe */
function why(run, probe) {
  const size = run.header.gradient_sample ?? run.header.sample;
  const low = probe.metrics?.[LOW];
  const bound = low === undefined ? '' : `; it is above ${number(low)}`;
  return `the sample${size ? ` of ${thousands(size)} examples` : ''} is too small to tell the gradient from its noise${bound}`;
}

/** @param {Probe | undefined} probe @param {string} metric */
function inWords(probe, metric) {
  const value = probe?.metrics?.[metric];
  if (value === undefined) return 'withheld';
  const [low, high] = [probe?.metrics?.[LOW], probe?.metrics?.[HIGH]];
  const hasBar = metric === SCALE && low !== undefined && high !== undefined;
  return number(value) + (hasBar ? ` (${number(low)} to ${number(high)})` : '');
}
