/** Any other number of the probes over steps, by choice. */

import { valueAxis } from '../axis.js';
import { card, choice, key } from '../card.js';
import { drawCurves, table } from '../curves.js';
import { heading } from '../format.js';

/** @typedef {import('../view.js').View} View */

const TITLE = 'Other numbers';
// Numbers of panels that show nothing without a space.
const OF_SPACES = new Set([
  'gradient_fraction', 'gradient_fraction_low', 'gradient_fraction_high', 'update_fraction', 'batch_gradient_fraction',
  'reliability', 'sharpness',
]); // prettier-ignore
const ELSEWHERE = ['step/', 'noise/scale'];
// Those with an edge at 1.
const EDGES = new Set(['sharpness_over_threshold', 'stability']);
const FIRST = ['sharpness_over_threshold', 'stability', 'gradient_hessian_cosine'];

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function others(host) {
  /** @type {View} */
  let shown;
  let place = () => {};
  const made = card(host, {
    name: 'others',
    title: TITLE,
    view: () => shown,
    lines: () => table(shown, offeredBy(shown)),
  });
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    const offered = offeredBy(view);
    made.node.hidden = !offered.length;
    made.note.replaceChildren();
    place = () => {};
    if (!offered.length) return;
    const chosen = [view.chosen.others, ...FIRST].find((name) => offered.includes(name)) ?? offered[0];
    choice(made.note, offered, chosen, TITLE, (name) =>
      view.change(() => {
        delete view.zooms.others;
        view.chosen.others = name;
      }),
    );
    if (EDGES.has(chosen)) key(made.note, 'edge of stability', { colour: 'var(--warn)', dash: '8 3 2 3' });
    made.title.textContent = `${TITLE}: ${heading(chosen)}`;
    const values = view.shown.flatMap((run) => run.metric(chosen));
    place = drawCurves(made.body, view, {
      name: 'others',
      curves: [{ metric: chosen, text: heading(chosen) }],
      y: valueAxis(view, 'others', EDGES.has(chosen) ? [...values, 0, 1] : values),
      yLabel: heading(chosen),
      levels: EDGES.has(chosen) ? [1] : [],
    }).place;
  };
  return { draw, move: () => place() };
}

/**
 * Keys that no other panel shows; those of the solver last.
 * @param {View} view
 */
function offeredBy(view) {
  const runs = view.shown.filter((run) => !run.isProjection);
  const keys = [...new Set(runs.flatMap((run) => run.keys()))];
  return keys
    .filter((name) => view.most === 0 || !OF_SPACES.has(name))
    .filter((name) => !ELSEWHERE.some((prefix) => name.startsWith(prefix)))
    .sort((a, b) => Number(a.startsWith('solver/')) - Number(b.startsWith('solver/')) || (a < b ? -1 : 1));
}
