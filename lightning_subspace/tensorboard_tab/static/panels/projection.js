/** What a projection took away from the steps of training, and the average that it waits for before it begins. */

import { shareAxis } from '../axis.js';
import { card, key } from '../card.js';
import { drawCurves, known, table } from '../curves.js';
import { thousands } from '../format.js';
import { leftOut, SIGNS } from '../marks.js';
import { make } from '../svg.js';
import { hideTip, showTip } from '../tip.js';

/** @typedef {import('../view.js').View} View */

const CURVES = [
  {
    metric: 'removed',
    text: 'removed',
    says: 'removed: |u − u′|²/|u|² of the step u, of which u′ was kept',
  },
  {
    metric: 'chi',
    text: 'chi',
    dash: '5 3',
    says: 'chi: |Pg|/|g|, averaged, which has to rise before the projection begins',
  },
];

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function projection(host) {
  /** @type {View} */
  let shown;
  let place = () => {};
  const { node, note, body } = card(host, {
    name: 'projection',
    title: 'What the projection takes from the steps',
    view: () => shown,
    lines: () =>
      table(shown, ['removed', 'chi']).map((row) => ({
        ...row,
        reason: shown.shown.find(({ name }) => name === row.run)?.at(row.step)?.reason,
      })),
  });
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    const runs = view.shown.filter((run) => run.isProjection);
    node.hidden = !runs.length;
    note.replaceChildren();
    place = () => {};
    if (!runs.length) return;
    const curves = known(view, CURVES);
    for (const { text, dash } of curves) key(note, text, { colour: 'currentColor', dash });
    const told = runs.map((run) => `${view.shown.length > 1 ? `${run.name}: ` : ''}${keeps(run)}`);
    note.append(told.join('; '));
    const lacking = runs.filter((run) => run.probes.some(({ reason }) => reason));
    if (lacking.length) make('span', { class: 'warn' }, note, ` ${SIGNS.withheld} no new space`);
    const drawn = drawCurves(body, view, {
      name: 'projection',
      curves,
      y: shareAxis(view, 'projection'),
      yLabel: 'share',
      below: 14 * lacking.length + (lacking.length ? 4 : 0),
    });
    place = drawn.place;
    lacking.forEach((run, row) =>
      leftOut(drawn.frame, run, {
        row,
        colour: view.colour(run),
        of: ({ reason }) => (reason ? 'withheld' : 'fine'),
        says: (event, { step, reason }) => {
          if (!event) return hideTip();
          showTip(event, `${run.name} · step ${thousands(step)} · no new space`, [{ label: reason ?? '', value: '' }]);
        },
      }),
    );
  };
  return { draw, move: () => place() };
}

/**
 * What is left of a step.
 * @param {import('../run.js').Run} run
 */
export const keeps = ({ header: { keep, k } }) =>
  `only what lies ${keep === 'top' ? 'in' : 'outside of'} the ${k} sharpest directions is kept`;
