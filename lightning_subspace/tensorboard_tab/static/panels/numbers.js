/** Any number of the probes, over steps: the others by choice, and those of the step that was taken. */

import { steps, ValueAxis } from '../axis.js';
import { card, choice } from '../card.js';
import { chart } from '../chart.js';
import { heading, number, thousands } from '../format.js';
import { level, line } from '../marks.js';
import { follow } from '../pointer.js';
import { showTip } from '../tip.js';

/** @typedef {import('../view.js').View} View */

// Numbers that have a panel of their own.
const ELSEWHERE = new Set([
  'gradient_fraction', 'gradient_fraction_low', 'gradient_fraction_high', 'update_fraction', 'batch_gradient_fraction',
  'reliability', 'sharpness',
]); // prettier-ignore
// Those with an edge at 1.
const EDGES = new Set(['sharpness_over_threshold', 'stability', 'step/edge_ratio']);

/** @param {HTMLElement} host */
export const others = (host) =>
  panel(host, {
    name: 'others',
    title: 'Other numbers',
    keys: (keys, most) =>
      keys
        .filter((key) => (!ELSEWHERE.has(key) && !key.startsWith('step/')) || most === 0)
        .sort((a, b) => Number(a.startsWith('solver/')) - Number(b.startsWith('solver/')) || (a < b ? -1 : 1)),
    first: ['sharpness_over_threshold', 'stability', 'gradient_hessian_cosine'],
  });

/** @param {HTMLElement} host */
export const taken = (host) =>
  panel(host, {
    name: 'taken',
    title: 'The step that was taken',
    keys: (keys) => keys.filter((key) => key.startsWith('step/')).sort(),
    first: ['step/edge_ratio', 'step/curvature'],
  });

/**
 * @param {HTMLElement} host
 * @param {object} options
 * @param {string} options.name
 * @param {string} options.title
 * @param {(keys: string[], most: number) => string[]} options.keys - which of all keys are offered, in order
 * @param {string[]} options.first - those that are shown before a person has chosen
 * @returns {import('../card.js').Panel}
 */
function panel(host, { name, title, keys, first }) {
  /** @type {View} */
  let shown;
  let place = () => {};
  let offered = /** @type {string[]} */ ([]);
  const axis = new ValueAxis();
  const made = card(host, { name, title, lines: () => lines(shown, offered) });
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    const runs = view.shown;
    offered = keys([...new Set(runs.flatMap((run) => run.keys()))], view.most);
    made.node.hidden = !offered.length;
    made.note.replaceChildren();
    place = () => {};
    if (!offered.length) return;
    const chosen = [view.chosen[name], ...first, offered[0]].find((key) => offered.includes(key)) ?? offered[0];
    choice(made.note, offered, chosen, title, (key) => {
      axis.zoom = null;
      view.change(() => {
        view.chosen[name] = key;
      });
    });
    made.title.textContent = `${title}: ${heading(chosen)}`;
    const values = runs.flatMap((run) => run.metric(chosen));
    const frame = chart(made.body, {
      x: steps(view),
      y: axis.fit(EDGES.has(chosen) ? [...values, 0, 1] : values),
      xLabel: 'step',
      yLabel: heading(chosen),
    });
    if (EDGES.has(chosen)) level(frame, 1, { colour: 'var(--warn)' });
    for (const run of runs) line(frame, run.steps, run.metric(chosen), { colour: view.colour(run), width: 1.8 });
    place = follow(frame, view, {
      zoomY: (range) => (axis.zoom = range),
      hover: (event, step) => {
        const rows = runs.map((run) => ({
          colour: view.colour(run),
          label: run.name,
          value: number(run.at(step)?.metrics?.[chosen], 4),
        }));
        showTip(event, `step ${thousands(step)}`, rows);
      },
    });
  };
  return { draw, move: () => place() };
}

/** @param {View} view @param {string[]} keys */
const lines = (view, keys) =>
  view.shown.flatMap((run) =>
    run.probes.map((probe) => ({
      run: run.name,
      step: probe.step,
      ...Object.fromEntries(keys.map((key) => [key, probe.metrics?.[key]])),
    })),
  );
