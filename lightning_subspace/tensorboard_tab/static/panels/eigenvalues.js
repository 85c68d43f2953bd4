/** Eigenvalues over steps, with the next one and the threshold of stability. */

import { steps, valueAxis } from '../axis.js';
import { card, key } from '../card.js';
import { chart } from '../chart.js';
import { indexColour } from '../colours.js';
import { lambda, number, thousands } from '../format.js';
import { line } from '../marks.js';
import { follow } from '../pointer.js';
import { extent, present } from '../series.js';
import { showTip } from '../tip.js';

/** @typedef {import('../view.js').View} View */

const FAR = 10; // a threshold that many times above or below all that is shown is told, not drawn

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function eigenvalues(host) {
  /** @type {View} */
  let shown;
  let place = () => {};
  const { node, note, body } = card(host, {
    name: 'eigenvalues',
    title: 'Eigenvalues of the Hessian',
    view: () => shown,
    lines: () => lines(shown),
  });
  node.classList.add('space');
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    const runs = view.shown;
    const count = view.count;
    const isAlone = runs.length === 1;
    const colour = (/** @type {any} */ run, /** @type {number} */ i) =>
      isAlone ? indexColour(i, count, view.dark) : view.colour(run);
    const values = runs.flatMap((run) => Array.from({ length: count }, (_, i) => run.eigenvalue(i)).flat());
    const next = runs.filter((run) => count === run.k).flatMap((run) => run.next());
    const known = present([...values, ...next]);
    const [least, most] = extent(known);
    const near = (/** @type {number} */ level) => level < FAR * most && level > least / FAR;
    const levels = runs.map((run) => run.threshold());
    const drawn = levels.map((of) => of.some((value) => value !== null && near(value)));
    const all = [...known, ...levels.filter((_, i) => drawn[i]).flatMap(present)];
    const frame = chart(body, {
      x: steps(view),
      y: valueAxis(view, 'eigenvalues', all, view.logarithmic),
      xLabel: 'step',
      yLabel: 'eigenvalue',
      height: 320,
    });
    runs.forEach((run, r) => {
      if (count === run.k)
        line(frame, run.steps, run.next(), { colour: colour(run, count - 1), dash: '3 3', width: 1.1, opacity: 0.8 });
      for (let i = count - 1; i >= 0; i--) {
        line(frame, run.steps, run.eigenvalue(i), {
          colour: colour(run, i),
          width: i ? 1.3 : 2,
          opacity: isAlone || !i ? 1 : 0.65,
        });
      }
      if (drawn[r])
        line(frame, run.steps, levels[r], {
          colour: isAlone ? 'var(--warn)' : view.colour(run),
          dash: '8 3 2 3',
          width: 1.3,
        }).classList.add('threshold');
    });
    note.replaceChildren();
    if (isAlone) {
      const [run] = runs;
      const isDrawn = (/** @type {(number | null)[]} */ of) =>
        of.some((value) => Number.isFinite(frame.y.at(value ?? NaN)));
      const places = Array.from({ length: count }, (_, i) => i).filter((i) => isDrawn(run.eigenvalue(i)));
      for (const i of new Set([...places.slice(0, 1), ...places.slice(-1)]))
        key(note, lambda(i + 1), { colour: colour(run, i) });
      if (count === run.k && isDrawn(run.next()))
        key(note, `${lambda(count + 1)}, estimated`, { colour: colour(run, count - 1), dash: '3 3' });
    } else if (count) note.append(count === 1 ? 'λ₁ of each run' : `the first ${count} of each run`);
    if (drawn.some(Boolean))
      key(note, 'threshold of stability', { colour: isAlone ? 'var(--warn)' : 'var(--soft)', dash: '8 3 2 3' });
    runs.forEach((run, r) => {
      const level = present(levels[r]).at(-1);
      if (!drawn[r] && level !== undefined)
        note.append(`${isAlone ? '' : `${run.name}: `}threshold ${number(level)}, beyond the axis `);
    });
    place = follow(frame, view, {
      name: 'eigenvalues',
      hover: (event, step) => {
        const height = event.clientY - frame.svg.getBoundingClientRect().top;
        tell(view, event, step, (value) => Math.abs(frame.y.at(value) - height), colour);
      },
    });
  };
  return { draw, move: () => place() };
}

/**
 * The eigenvalue under the pointer, by its index, and the others of its run.
 * @param {View} view
 * @param {PointerEvent} event
 * @param {number} step
 * @param {(value: number) => number} distance
 * @param {(run: any, index: number) => string} colour
 */
function tell(view, event, step, distance, colour) {
  const found = view.shown.flatMap((run) => {
    const probe = run.until(step);
    const values = (probe?.eigenvalues ?? []).slice(0, view.count);
    return values.map((value, index) => ({ run, probe, index, value }));
  });
  const known = /** @type {(typeof found[0] & {value: number})[]} */ (found.filter(({ value }) => value !== null));
  if (!known.length) return showTip(event, `step ${thousands(step)}`, [{ label: 'no eigenvalue is known', value: '' }]);
  const best = known.reduce((a, b) => (distance(b.value) < distance(a.value) ? b : a));
  const { run, probe } = best;
  const at = `step ${thousands(probe.step)}`;
  const rows = known
    .filter((other) => other.run === run && Math.abs(other.index - best.index) < 3)
    .map(({ index, value }) => ({
      colour: colour(run, index),
      label: lambda(index + 1),
      value: `${number(value, 4)} ± ${number(probe.residuals?.[index], 2)}`,
      strong: index === best.index,
    }));
  if (probe.threshold)
    rows.push({
      colour: 'var(--warn)',
      label: 'λ₁ / threshold',
      value: number((probe.eigenvalues?.[0] ?? NaN) / probe.threshold),
      strong: false,
    });
  showTip(event, `${view.shown.length > 1 ? `${run.name} · ` : ''}${at} · index ${best.index + 1}`, rows);
}

/** @param {View} view */
const lines = (view) =>
  view.shown.flatMap((run) =>
    run.probes.map((probe) => ({
      run: run.name,
      step: probe.step,
      ...Object.fromEntries((probe.eigenvalues ?? []).map((value, i) => [`eigenvalue ${i + 1}`, value])),
      ...Object.fromEntries((probe.residuals ?? []).map((value, i) => [`residual ${i + 1}`, value])),
      next: probe.next,
      threshold: probe.threshold,
    })),
  );
