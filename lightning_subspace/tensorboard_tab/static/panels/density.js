/** Spectral densities over the steps, one above another, of one run. */

import { card } from '../card.js';
import { chart } from '../chart.js';
import { css, viridis } from '../colours.js';
import { thousands } from '../format.js';
import { fitted, scale } from '../scales.js';
import { make } from '../svg.js';

/** @typedef {import('../view.js').View} View */

const MOST = 24; // ridges
const DECADES = 5; // of a density that are shown

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function density(host) {
  /** @type {View} */
  let shown;
  const { node, title, note, body } = card(host, {
    name: 'density',
    title: 'Spectral density',
    view: () => shown,
    isOfRuns: false,
    lines: () => lines(shown),
  });
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    const run = [view.focused, ...view.shown].find((one) => one?.probes.some((probe) => probe.density));
    node.hidden = !run;
    if (!run) return;
    title.textContent = `Spectral density${view.shown.length > 1 ? `, ${run.name}` : ''}`;
    note.replaceChildren(`logarithmic, the last ${DECADES} decades of each; the chosen step in front`);
    const all = run.probes.filter((probe) => probe.density);
    const every = Math.max(1, Math.ceil(all.length / MOST));
    const drawn = all.filter((_, i) => (all.length - 1 - i) % every === 0);
    const chosen = all.findLast((probe) => probe.step <= view.step) ?? all[0];
    const { kind, domain, edge } = fitted(
      all.flatMap((probe) => probe.density?.[0] ?? []),
      true,
    );
    const frame = chart(body, {
      x: (range) => scale(kind, domain, range, edge),
      y: (range) => scale('linear', [0, drawn.length + 2], range),
      xLabel: 'eigenvalue',
      yLabel: 'step, upwards',
      height: Math.min(420, 160 + 14 * drawn.length),
    });
    for (const text of frame.svg.querySelectorAll('text[text-anchor=end]')) text.remove();
    const space = frame.inner.bottom - frame.y.at(1);
    [...drawn].reverse().forEach((probe, i) => {
      const row = drawn.length - 1 - i;
      ridge(frame, probe, {
        base: frame.y.at(row),
        height: 2 * space,
        fill: css(viridis(row / drawn.length)),
        isChosen: probe === chosen,
      });
      if (row % Math.ceil(drawn.length / 8) === 0) {
        make(
          'text',
          { x: frame.inner.left - 6, y: frame.y.at(row) + 4, 'text-anchor': 'end' },
          frame.over,
          thousands(probe.step),
        );
      }
    });
    if (!drawn.includes(chosen))
      ridge(frame, chosen, { base: frame.inner.bottom, height: 2 * space, fill: 'none', isChosen: true });
  };
  return { draw, move: draw };
}

/**
 * @param {import('../chart.js').Chart} frame
 * @param {import('../run.js').Probe} probe
 * @param {{base: number, height: number, fill: string, isChosen: boolean}} style
 */
function ridge(frame, probe, { base, height, fill, isChosen }) {
  const [nodes, values] = probe.density ?? [[], []];
  const top = Math.log10(Math.max(...values));
  const points = nodes.map((node, i) => {
    const share = Math.max(0, (Math.log10(Math.max(values[i], 1e-300)) - top + DECADES) / DECADES);
    return `${frame.x.at(node).toFixed(1)} ${(base - share * height).toFixed(1)}`;
  });
  const d = `M${frame.x.at(nodes[0]).toFixed(1)} ${base.toFixed(1)}L${points.join('L')}L${frame.x.at(nodes[nodes.length - 1]).toFixed(1)} ${base.toFixed(1)}Z`;
  const stroke = isChosen ? 'var(--cross)' : 'var(--card)';
  make(
    'path',
    { d, fill, stroke, 'stroke-width': isChosen ? 2 : 0.8, 'fill-opacity': 0.85, class: 'ridge' },
    frame.area,
  );
}

/** @param {View} view */
const lines = (view) =>
  view.shown.flatMap((run) =>
    run.probes.flatMap((probe) =>
      (probe.density?.[0] ?? []).map((node, i) => ({
        run: run.name,
        step: probe.step,
        eigenvalue: node,
        density: probe.density?.[1][i],
      })),
    ),
  );
