/** What the chosen step of the run in focus says, in one sentence or two. */

import { number, thousands } from '../format.js';
import { stateOf } from '../run.js';
import { keeps } from './projection.js';
import { make } from '../svg.js';

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function words(host) {
  const node = make('p', { id: 'words', role: 'status' }, host);
  /** @param {import('../view.js').View} view */
  const draw = (view) => {
    node.replaceChildren();
    const run = view.focused;
    const probe = run?.until(view.step);
    if (!run || !probe) return;
    const name = view.shown.length > 1 ? `${run.name}, ` : '';
    node.append(`${name}step ${thousands(probe.step)}`);
    const found = sentences(probe, run);
    if (found.length || probe.reason || stateOf(probe) !== 'fine') node.append(': ');
    if (probe.failed) {
      make('span', { class: 'warn' }, node, `the probe failed: ${probe.failed}`);
      return;
    }
    const lack = run.isProjection
      ? probe.reason && `no new space: ${probe.reason}`
      : stateOf(probe) !== 'fine' && (probe.reason ?? probe.outcome);
    if (lack) make('span', { class: 'warn' }, node, `${lack}. `);
    node.append(...found.map((text) => `${text} `));
    if (run.isNewer)
      make('span', { class: 'warn' }, node, 'Some probes were written by a newer version and are not shown.');
  };
  return { draw, move: draw };
}

/** @param {Record<string, number>} values @param {import('../run.js').Run} run */
function ofProjection({ removed, chi }, run) {
  const found = [];
  if (removed !== undefined) found.push(`${number(100 * removed)} % of the step was taken away: ${keeps(run)}.`);
  if (chi !== undefined) found.push(`The average of |Pg|/|g| is ${number(chi)}.`);
  return found;
}

/**
 * @param {import('../run.js').Probe} probe
 * @param {import('../run.js').Run} run
 */
export function sentences(probe, run) {
  const values = probe.metrics ?? {};
  const found = [];
  const share = values.gradient_fraction;
  if (share !== undefined) {
    const [low, high] = [values.gradient_fraction_low, values.gradient_fraction_high];
    const bar = low !== undefined && high !== undefined ? ` (${number(100 * low)} to ${number(100 * high)} %)` : '';
    const chance = run.header.n ? `, ${number((100 * run.k) / run.header.n, 1)} % by chance` : '';
    found.push(`${number(100 * share)} %${bar} of the gradient lies in the ${run.k} sharpest directions${chance}.`);
  }
  if (run.isProjection) return ofProjection(values, run);
  const sharpest = probe.eigenvalues?.[0];
  if (sharpest !== undefined && sharpest !== null) {
    const edge = probe.threshold
      ? `, ${number(sharpest / probe.threshold, 2)} of the threshold of stability ${number(probe.threshold)}`
      : '';
    found.push(`λ₁ = ${number(sharpest)}${edge}.`);
  }
  if (share === undefined && values.gradient_hessian_cosine !== undefined) {
    found.push(`The cosine of g and Hg is ${number(values.gradient_hessian_cosine, 2)}.`);
  }
  const [ratio, change] = [values['step/edge_ratio'], values['step/change']];
  if (change !== undefined) {
    const promise = ratio < 1 ? `, ${number(100 * (1 - ratio), 2)} % of what its gradient promised` : '';
    found.push(
      `The step from here ${change > 0 ? 'raised' : 'lowered'} the loss by ${number(Math.abs(change))}${promise}.`,
    );
  }
  if (probe.verified === false) found.push('Nobody has looked for eigenvalues that the solver may have missed.');
  return found;
}
