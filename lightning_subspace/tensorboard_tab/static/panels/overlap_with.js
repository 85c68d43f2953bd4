/** Overlap of every probe's space with that of the chosen step. */

import { shareAxis, steps } from '../axis.js';
import { card, key } from '../card.js';
import { chart } from '../chart.js';
import { number, thousands } from '../format.js';
import { level, line } from '../marks.js';
import { follow } from '../pointer.js';
import { nearest } from '../series.js';
import { make } from '../svg.js';
import { showTip } from '../tip.js';

/** @typedef {import('../view.js').View} View */

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function overlapWith(host) {
  /** @type {View} */
  let shown;
  const { node, title, note, body } = card(host, {
    name: 'survival',
    title: 'Overlap',
    view: () => shown,
    lines: () => lines(shown),
  });
  node.classList.add('space');
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    title.textContent = `Overlap with the space of step ${thousands(view.step)}`;
    const runs = view.shown;
    const frame = chart(body, { x: steps(view), y: shareAxis(view, 'survival'), xLabel: 'step', yLabel: 'overlap' });
    const of = new Map(runs.map((run) => [run, series(run, chosen(run, view.step))]));
    for (const run of runs) {
      if (run.header.n && run.k) level(frame, run.k / run.header.n, { colour: view.colour(run), dash: '1 3' });
      const known = of.get(run) ?? [];
      line(
        frame,
        known.map(([step]) => step),
        known.map(([, value]) => value),
        { colour: view.colour(run), width: 1.8 },
      );
    }
    note.replaceChildren('1: the same space');
    if (runs.some((run) => run.header.n && run.k))
      key(note, 'k/n: unrelated ones', { colour: 'currentColor', dash: '1 3' });
    const lacking = runs.filter((run) => !(of.get(run) ?? []).length);
    if (lacking.length)
      make('span', { class: 'warn' }, note, `nothing to compare: ${lacking.map((run) => run.name).join(', ')}`);
    follow(frame, view, {
      name: 'survival',
      hover: (event, step) => {
        const rows = runs.flatMap((run) => {
          const base = chosen(run, view.step);
          const found = (of.get(run) ?? []).find(([other]) => other === step);
          if (base === undefined) return [];
          return [
            { colour: view.colour(run), label: `${run.name}: with ${thousands(base)}`, value: number(found?.[1]) },
          ];
        });
        showTip(event, `step ${thousands(step)}`, rows);
      },
    });
  };
  return { draw, move: draw };
}

/**
 * The step whose space stands for the chosen one: itself, or the nearest one that was compared with others.
 * @param {import('../run.js').Run} run
 * @param {number} step
 */
function chosen(run, step) {
  if (run.at(step)?.trusted) return step;
  const held = run.held();
  return held[nearest(held, step)];
}

/**
 * Overlaps that are known with the space at a step.
 * @param {import('../run.js').Run} run
 * @param {number | undefined} base
 */
const series = (run, base) => (base === undefined ? [] : run.overlapsWith(base));

/** @param {View} view */
const lines = (view) =>
  view.shown.flatMap((run) => {
    const base = chosen(run, view.step);
    return series(run, base).map(([step, value]) => ({ run: run.name, with: base, step, overlap: value }));
  });
