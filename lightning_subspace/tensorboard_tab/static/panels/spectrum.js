/** The spectrum at the chosen step: a stem for each eigenvalue, and the gap behind the last one. */

import { valueAxis } from '../axis.js';
import { card, key } from '../card.js';
import { chart } from '../chart.js';
import { lambda, number, thousands } from '../format.js';
import { drag } from '../pointer.js';
import { level } from '../marks.js';
import { scale } from '../scales.js';
import { make } from '../svg.js';
import { showTip } from '../tip.js';

/** @typedef {import('../view.js').View} View */

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function spectrum(host) {
  /** @type {View} */
  let shown;
  /** @type {((range: [number, number]) => import('../scales.js').Scale) | null} */
  let still = null;
  const { node, title, note, body } = card(host, {
    name: 'spectrum',
    title: 'Spectrum',
    view: () => shown,
    lines: () => lines(shown),
  });
  node.classList.add('space');
  /** @param {View} view */
  const draw = (view) => {
    // Over all steps, which are looked through only when they are others.
    const probes = view.still ? view.shown.flatMap((run) => run.probes) : [];
    const values = probes.flatMap((probe) => [...(probe.eigenvalues ?? []), probe.next]);
    still = view.still ? valueAxis(view, 'spectrum', values, view.logarithmic) : null;
    move(view);
  };
  /** @param {View} view */
  const move = (view) => {
    shown = view;
    const runs = view.shown;
    const at = runs.map((run) => run.until(view.step));
    const most = view.most;
    title.textContent = `Spectrum at step ${thousands(view.step)}`;
    const now = at.flatMap((probe) => [...(probe?.eigenvalues ?? []), probe?.next]);
    const frame = chart(body, {
      x: (range) => scale('linear', [0.4, most + 1.6], range),
      y: still ?? valueAxis(view, 'spectrum', now, view.logarithmic),
      xLabel: 'index',
      yLabel: 'eigenvalue',
      height: 320,
      xTicks: Array.from({ length: most + 1 }, (_, i) => i + 1),
    });
    const zero = frame.y.kind === 'log' ? frame.inner.bottom : frame.y.at(Math.max(frame.y.low, 0));
    runs.forEach((run, r) => {
      const probe = at[r];
      const values = probe?.eigenvalues ?? [];
      const shift = runs.length > 1 ? ((r - (runs.length - 1) / 2) * 0.6) / runs.length : 0;
      const colour = view.colour(run);
      const group = make('g', { class: 'stems' }, frame.area);
      if (runs.length === 1) gap(frame, probe, run.k);
      [...values, probe?.next].forEach((value, i) => {
        if (value === null || value === undefined) return;
        const isNext = i >= values.length;
        const [x, y] = [frame.x.at(i + 1 + shift), frame.y.at(value)];
        make(
          'line',
          {
            x1: x,
            x2: x,
            y1: zero,
            y2: y,
            stroke: colour,
            'stroke-width': 1.6,
            'stroke-dasharray': isNext ? '2 3' : null,
          },
          group,
        );
        const residual = probe?.residuals?.[i] ?? 0;
        const [low, high] = [frame.y.at(value - residual), frame.y.at(value + residual)];
        if (Math.abs(high - low) > 8)
          make('line', { x1: x, x2: x, y1: low, y2: high, stroke: 'var(--ink)', 'stroke-width': 1 }, group);
        make(
          'circle',
          { cx: x, cy: y, r: 4, fill: isNext ? 'var(--card)' : colour, stroke: colour, 'stroke-width': 1.5 },
          group,
        );
      });
      if (probe?.threshold) level(frame, probe.threshold, { colour: runs.length > 1 ? colour : 'var(--warn)' });
    });
    note.replaceChildren();
    const levels = at.map((probe) => probe?.threshold ?? NaN);
    if (levels.some((value) => value >= frame.y.low && value <= frame.y.high))
      key(note, 'threshold of stability', {
        colour: runs.length > 1 ? 'currentColor' : 'var(--warn)',
        dash: '8 3 2 3',
      });
    note.append(runs.map((run, r) => `${runs.length > 1 ? `${run.name}: ` : ''}${says(at[r], run.k)}`).join('; '));
    drag(frame, {
      hover: (event, x) => {
        const index = Math.min(Math.max(Math.round(frame.x.invert(x)), 1), most + 1);
        const rows = runs.map((run, r) => ({
          colour: view.colour(run),
          label: run.name,
          value: valueOf(at[r], index, run.k),
        }));
        showTip(event, `index ${index}${index > most ? ', estimated' : ''}`, rows);
      },
      click: () => {},
      zoom: (_, ys) => {
        if (ys)
          view.change(() => {
            view.zooms.spectrum = [frame.y.invert(ys[1]), frame.y.invert(ys[0])];
          });
      },
      reset: () =>
        view.change(() => {
          delete view.zooms.spectrum;
        }),
    });
  };
  return { draw, move };
}

/**
 * @param {import('../chart.js').Chart} frame
 * @param {import('../run.js').Probe | undefined} probe
 * @param {number} k
 */
function gap(frame, probe, k) {
  const last = probe?.eigenvalues?.[k - 1];
  if (last === null || last === undefined || probe?.next === undefined) return;
  const [top, bottom] = [frame.y.at(Math.max(last, probe.next)), frame.y.at(Math.min(last, probe.next))];
  const place = { x: frame.x.at(k), y: top, width: frame.x.at(k + 1) - frame.x.at(k), height: bottom - top };
  make('rect', { ...place, fill: 'var(--gap)', opacity: 0.25, class: 'gap' }, frame.area);
}

/**
 * What is known of the gap.
 * @param {import('../run.js').Probe | undefined} probe
 * @param {number} k
 */
function says(probe, k) {
  if (!probe) return 'no probe';
  if (probe.failed) return 'the probe failed';
  if (!probe.eigenvalues) return 'the eigenvalues did not converge';
  const error = probe.metrics?.['solver/subspace_error'];
  const ratio = error === undefined ? '' : `residual/gap ${number(error, 2)}`;
  const last = probe.eigenvalues[k - 1];
  if (probe.next === undefined || last === null || last === undefined) {
    return [ratio, `${lambda(k + 1)} is not known to 5 % at this probe`].filter(Boolean).join(', ');
  }
  return [`gap ${lambda(k)} − ${lambda(k + 1)} = ${number(last - probe.next, 2)}`, ratio].filter(Boolean).join(', ');
}

/**
 * @param {import('../run.js').Probe | undefined} probe
 * @param {number} index - from 1
 * @param {number} k
 */
function valueOf(probe, index, k) {
  if (index > k) return number(probe?.next, 4);
  return `${number(probe?.eigenvalues?.[index - 1], 4)} ± ${number(probe?.residuals?.[index - 1], 2)}`;
}

/** @param {View} view */
const lines = (view) =>
  view.shown.flatMap((run) => {
    const probe = run.until(view.step);
    const values = [...(probe?.eigenvalues ?? []), ...(probe?.next === undefined ? [] : [probe.next])];
    return values.map((value, i) => ({
      run: run.name,
      step: probe?.step,
      index: i + 1,
      eigenvalue: value,
      residual: probe?.residuals?.[i],
    }));
  });
