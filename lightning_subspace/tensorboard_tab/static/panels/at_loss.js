/** Runs beside each other at equal training loss: at equal steps a faster one is compared with a slower one's past. */

import { valueAxis } from '../axis.js';
import { card, choice } from '../card.js';
import { chart } from '../chart.js';
import { heading, number, thousands } from '../format.js';
import { line } from '../marks.js';
import { drag } from '../pointer.js';
import { lossOf } from '../run.js';
import { fitted, scale } from '../scales.js';
import { make } from '../svg.js';
import { showTip } from '../tip.js';

/** @typedef {import('../view.js').View} View */

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function atLoss(host) {
  /** @type {View} */
  let shown;
  let move = () => {};
  const { node, note, body } = card(host, {
    name: 'at_loss',
    title: 'At equal training loss',
    view: () => shown,
    lines: () => lines(shown),
  });
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    const runs = view.shown.filter((run) => run.loss().some((value) => value !== null));
    node.hidden = !runs.length;
    note.replaceChildren();
    move = () => {};
    if (!runs.length) return;
    const keys = [...new Set(runs.flatMap((run) => run.keys()))].filter((key) => !key.endsWith('_loss')).sort();
    const chosen =
      [view.chosen.at_loss, 'gradient_fraction', 'sharpness', keys[0]].find((key) => keys.includes(key)) ?? '';
    choice(note, keys, chosen, 'number', (key) => {
      view.change(() => {
        delete view.zooms.at_loss;
        view.chosen.at_loss = key;
      });
    });
    const { kind, domain, edge } = fitted(
      runs.flatMap((run) => run.loss()),
      true,
    );
    const isShare = /fraction|cosine|overlap/.test(chosen);
    const values = runs.flatMap((run) => run.metric(chosen));
    const zoom = view.zooms.training_loss;
    const [low, high] = zoom && (kind !== 'log' || zoom[0] > 0) ? zoom : domain;
    const frame = chart(body, {
      x: (range) => scale(kind, [high, low], range, edge), // training goes to the right
      y: valueAxis(view, 'at_loss', isShare ? [...values, 0, 1] : values),
      xLabel: 'training loss',
      yLabel: heading(chosen),
    });
    for (const run of runs) {
      line(frame, run.loss(), run.metric(chosen), { colour: view.colour(run), width: 1.6 });
    }
    const dots = runs.map((run) =>
      make('circle', { r: 5, class: 'chosen', fill: 'none', stroke: view.colour(run), 'stroke-width': 2 }, frame.over),
    );
    move = () => runs.forEach((run, r) => mark(frame, dots[r], run, chosen, view.step));
    move();
    drag(frame, {
      hover: (event, x, y) => {
        const found = closest(frame, runs, chosen, x, y);
        if (!found) return;
        const { run, probe, loss, value } = found;
        const rows = [
          { label: 'training loss', value: number(loss, 4) },
          { colour: view.colour(run), label: heading(chosen), value: number(value, 4) },
        ];
        showTip(event, `${run.name} · step ${thousands(probe.step)}`, rows);
      },
      click: (x, y) => {
        const found = closest(frame, runs, chosen, x, y);
        if (found) view.choose(found.probe.step);
      },
      zoom: (xs, ys) =>
        view.change(() => {
          view.zooms.training_loss = [frame.x.invert(xs[1]), frame.x.invert(xs[0])];
          if (ys) view.zooms.at_loss = [frame.y.invert(ys[1]), frame.y.invert(ys[0])];
        }),
      reset: () =>
        view.change(() => {
          delete view.zooms.training_loss;
          delete view.zooms.at_loss;
        }),
    });
  };
  return { draw, move: () => move() };
}

/**
 * The probe nearest to a place in pixels.
 * @param {import('../chart.js').Chart} frame
 * @param {import('../run.js').Run[]} runs
 * @param {string} key
 * @param {number} x
 * @param {number} y
 */
function closest(frame, runs, key, x, y) {
  let best = null;
  let least = Infinity;
  for (const run of runs) {
    const losses = run.loss();
    run.probes.forEach((probe, i) => {
      const [loss, value] = [losses[i], probe.metrics?.[key]];
      if (loss === null || value === undefined) return;
      const distance = Math.hypot(frame.x.at(loss) - x, frame.y.at(value) - y);
      if (distance < least) [best, least] = [{ run, probe, loss, value }, distance];
    });
  }
  return /** @type {{run: import('../run.js').Run, probe: import('../run.js').Probe, loss: number, value: number} | null} */ (
    best
  );
}

/**
 * Put the dot of a run where it is at a step.
 * @param {import('../chart.js').Chart} frame
 * @param {SVGElement} dot
 * @param {import('../run.js').Run} run
 * @param {string} key
 * @param {number} step
 */
function mark(frame, dot, run, key, step) {
  const probe = run.until(step);
  const [x, y] = [frame.x.at(probe ? (lossOf(probe) ?? NaN) : NaN), frame.y.at(probe?.metrics?.[key] ?? NaN)];
  const { left, right, top, bottom } = frame.inner;
  const isThere = x >= left - 1 && x <= right + 1 && y >= top - 1 && y <= bottom + 1; // of a NaN: false
  dot.setAttribute('visibility', isThere ? 'visible' : 'hidden');
  if (!isThere) return;
  dot.setAttribute('cx', String(x));
  dot.setAttribute('cy', String(y));
}

/** @param {View} view */
const lines = (view) =>
  view.shown.flatMap((run) =>
    run.probes.map((probe, i) => ({ run: run.name, step: probe.step, loss: run.loss()[i], ...probe.metrics })),
  );
