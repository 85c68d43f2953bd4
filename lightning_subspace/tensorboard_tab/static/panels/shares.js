/** Shares of the gradient and of updates in the top space, with what each probe left out. */

import { shareAxis, steps } from '../axis.js';
import { card, chip, key } from '../card.js';
import { chart } from '../chart.js';
import { number, thousands } from '../format.js';
import { errorBars, leftOut, level, line, SIGNS } from '../marks.js';
import { follow } from '../pointer.js';
import { STATES, stateOf } from '../run.js';
import { make } from '../svg.js';
import { lineSwatch } from '../swatch.js';
import { hideTip, showTip } from '../tip.js';

/** @typedef {import('../view.js').View} View */

/** @type {{metric: string, text: string, dash?: string, width: number, says: string}[]} */
const SHARES = [
  { metric: 'gradient_fraction', text: 'gradient', width: 2, says: '|Pg|²/|g|² of the gradient of the training loss' },
  {
    metric: 'update_fraction',
    text: 'update',
    dash: '5 3',
    width: 1.2,
    says: '|Pu|²/|u|² of the next change of the parameters',
  },
  {
    metric: 'batch_gradient_fraction',
    text: 'batch gradient',
    dash: '2 3',
    width: 1.2,
    says: 'the same of the mini-batch gradient',
  },
  {
    metric: 'gradient_hessian_cosine',
    text: 'cos(g, Hg)',
    dash: '8 3 2 3',
    width: 1.2,
    says: '1: the gradient is an eigenvector',
  },
  {
    metric: 'reliability',
    text: 'reliability',
    dash: '1 2',
    width: 1.4,
    says: 'share of one half of the sample in the space of the other',
  },
];

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function shares(host) {
  /** @type {View} */
  let shown;
  let place = () => {};
  const { node, note, body } = card(host, {
    name: 'shares',
    title: 'Share of the gradient and of the update in the top space',
    view: () => shown,
    lines: () => lines(shown),
  });
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    const runs = view.shown;
    const there = SHARES.filter(({ metric }) => runs.some((run) => run.metric(metric).some((value) => value !== null)));
    const lacking = runs.filter((run) => run.probes.some((probe) => stateOf(probe) !== 'fine'));
    node.hidden = view.most === 0 && !lacking.length; // its numbers are then among the others
    if (node.hidden) return;
    const frame = chart(body, {
      x: steps(view),
      y: shareAxis(view, 'shares'),
      xLabel: 'step',
      yLabel: 'share',
      height: 320 + 14 * lacking.length,
      below: 14 * lacking.length + (lacking.length ? 4 : 0),
    });
    for (const run of runs) {
      if (run.header.n && run.k) level(frame, run.k / run.header.n, { colour: view.colour(run), dash: '1 3' });
    }
    for (const { metric, dash, width } of there) {
      if (!view.shares.has(metric)) continue;
      for (const run of runs)
        line(frame, run.steps, run.metric(metric), { colour: view.colour(run), dash, width, opacity: dash ? 0.8 : 1 });
    }
    if (view.shares.has('gradient_fraction')) {
      for (const run of runs) {
        errorBars(
          frame,
          run.steps,
          run.metric('gradient_fraction_low'),
          run.metric('gradient_fraction_high'),
          view.colour(run),
        );
      }
    }
    legend(view, note, there, runs);
    place = follow(frame, view, {
      name: 'shares',
      hover: (event, step) => tell(view, event, step, there),
    });
    lacking.forEach((run, row) =>
      leftOut(frame, run, {
        row,
        colour: view.colour(run),
        says: (event, probe) => {
          if (!event) return hideTip();
          const state = /** @type {'undetermined' | 'unconverged' | 'failed'} */ (stateOf(probe));
          const why = probe.failed ?? probe.reason ?? probe.outcome ?? '';
          showTip(event, `${run.name} · step ${thousands(probe.step)} · ${state}`, [{ label: why, value: '' }]);
        },
      }),
    );
  };
  return { draw, move: () => place() };
}

/**
 * Chips to choose the lines, and how many probes left something out.
 * @param {View} view
 * @param {HTMLElement} note
 * @param {typeof SHARES} there
 * @param {import('../run.js').Run[]} runs
 */
function legend(view, note, there, runs) {
  note.replaceChildren();
  for (const { metric, text, dash, says } of there) {
    const isOn = view.shares.has(metric);
    const toggle = () =>
      view.change(() => {
        if (!view.shares.delete(metric)) view.shares.add(metric);
      });
    chip(note, text, { isOn, says, swatch: lineSwatch('currentColor', dash), toggle });
  }
  if (runs.some((run) => run.header.n && run.k)) key(note, 'k/n, chance', { colour: 'currentColor', dash: '1 3' });
  for (const state of /** @type {const} */ (['undetermined', 'unconverged', 'failed'])) {
    const count = runs.reduce((sum, run) => sum + run.count(state), 0);
    if (count) make('span', { class: 'warn', title: STATES[state] }, note, `${SIGNS[state]} ${count} ${state}`);
  }
}

/**
 * @param {View} view
 * @param {PointerEvent} event
 * @param {number} step
 * @param {typeof SHARES} there
 */
function tell(view, event, step, there) {
  const rows = view.shown.flatMap((run) => {
    const probe = run.at(step);
    if (!probe) return [];
    return there
      .filter(({ metric }) => view.shares.has(metric))
      .map(({ metric, text }) => {
        const value = probe.metrics?.[metric];
        const [low, high] = [probe.metrics?.gradient_fraction_low, probe.metrics?.gradient_fraction_high];
        const hasBar = metric === 'gradient_fraction' && low !== undefined && high !== undefined;
        return {
          colour: view.colour(run),
          label: view.shown.length > 1 ? `${run.name} ${text}` : text,
          value: number(value) + (hasBar ? ` (${number(low)} to ${number(high)})` : ''),
        };
      });
  });
  showTip(event, `step ${thousands(step)}`, rows);
}

/** @param {View} view */
const lines = (view) => {
  const keys = [...SHARES.map(({ metric }) => metric), 'gradient_fraction_low', 'gradient_fraction_high'];
  return view.shown.flatMap((run) =>
    run.probes.map((probe) => ({
      run: run.name,
      step: probe.step,
      ...Object.fromEntries(keys.map((metric) => [metric, probe.metrics?.[metric]])),
      state: stateOf(probe),
      reason: probe.failed ?? probe.reason,
    })),
  );
};
