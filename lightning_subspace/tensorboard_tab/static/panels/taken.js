/** The step that was taken from each probe: what it gained, and beside it how far it is from too long. */

import { valueAxis } from '../axis.js';
import { card, choice, key } from '../card.js';
import { drawCurves, known, table, valueOf } from '../curves.js';
import { heading } from '../format.js';
import { make } from '../svg.js';

/** @typedef {import('../view.js').View} View */
/** @typedef {import('../curves.js').Curve} Curve */

const NAME = 'taken';
/** @type {Curve[]} */
const LOSSES = [
  {
    metric: 'step/gain',
    text: 'gain',
    says: 'gain: what the gradient promises of the step, −g·u; above 0 it is a descent',
  },
  {
    metric: 'step/change',
    text: 'change',
    dash: '5 3',
    says: 'change: of the loss of the sample over the step; below 0 the step helped',
  },
];
/** @type {Curve[]} */
const OTHERS = [
  {
    metric: 'step/edge_ratio',
    text: 'edge ratio',
    says: 'edge ratio: 1 + change/gain, of one sample; above 1 the step raised the loss. With the full batch 1 is the edge of stability; it is not defined where the gain is not positive',
  },
  {
    metric: 'step/edge_ratio_pooled',
    text: 'edge ratio, pooled',
    says: 'pooled: over the last probes; near 1 the loss oscillates as fast as it falls',
  },
  {
    metric: 'step/curvature',
    text: 'curvature',
    says: 'curvature: of the loss along the step, as far as it went; in units of the eigenvalues',
  },
  {
    metric: 'step/uphill',
    text: 'uphill',
    says: 'uphill: the share of the last probes whose step had no gain',
  },
  { metric: 'step/norm', text: 'length', says: 'length: |u|, of the change of the parameters' },
  {
    metric: 'step/relative_norm',
    text: 'relative length',
    says: 'relative length: |u|/|θ|, the part of the parameters that the step is long',
  },
  {
    metric: 'step/cosine_previous',
    text: 'cosine with the step before',
    says: 'cosine: near 1 steps go the same way; near −1 to and fro, as at the edge of stability; near 0 as noise does',
  },
];
// Lines to compare a number with: the edge of stability; no curvature; steps at a right angle.
/** @type {Record<string, number>} */
const LEVELS = { 'step/edge_ratio': 1, 'step/edge_ratio_pooled': 1, 'step/curvature': 0, 'step/cosine_previous': 0 };
/** @type {Record<string, number[]>} */
const SHOWN = {
  'step/edge_ratio': [0, 1],
  'step/edge_ratio_pooled': [0, 1],
  'step/curvature': [0],
  'step/uphill': [0, 1],
  'step/cosine_previous': [-1, 1],
};

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function taken(host) {
  /** @type {View} */
  let shown;
  /** @type {(() => void)[]} */
  let places = [];
  const { node, note, body } = card(host, {
    name: NAME,
    title: 'The step that was taken',
    view: () => shown,
    lines: () => table(shown, keysOf(shown)),
  });
  node.classList.add('wide');
  body.classList.add('pair');
  const [left, right] = [make('div', {}, body), make('div', {}, body)];
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    const keys = keysOf(view);
    node.hidden = !keys.length;
    note.replaceChildren();
    left.replaceChildren();
    right.replaceChildren();
    places = [];
    if (!keys.length) return;
    const losses = known(view, LOSSES);
    const rest = keys.filter((metric) => !LOSSES.some((loss) => loss.metric === metric));
    [left.hidden, right.hidden] = [!losses.length, !rest.length]; // before the other takes its width
    if (losses.length) {
      for (const { text, dash } of losses) key(note, text, { colour: 'currentColor', dash });
      const values = view.shown.flatMap((run) => losses.flatMap(({ metric }) => run.metric(metric)));
      const y = valueAxis(view, NAME, [...values, 0], true);
      places.push(
        drawCurves(left, view, { name: NAME, curves: losses, y, yLabel: 'gain, change: loss', levels: [0], left: 68 })
          .place,
      );
    }
    if (!rest.length) return;
    const chosen = rest.find((metric) => metric === view.chosen[NAME]) ?? rest[0];
    choice(note, rest, chosen, 'number of the step', (metric) =>
      view.change(() => {
        delete view.zooms[`${NAME}_number`];
        view.chosen[NAME] = metric;
      }),
    );
    if (LEVELS[chosen] === 1) key(note, 'edge', { colour: 'var(--warn)', dash: '8 3 2 3' });
    const curve = OTHERS.find(({ metric }) => metric === chosen) ?? { metric: chosen, text: nameOf(chosen) };
    const values = view.shown.flatMap((run) => run.metric(chosen));
    places.push(
      drawCurves(right, view, {
        name: `${NAME}_number`,
        curves: [curve],
        y: valueAxis(view, `${NAME}_number`, [...values, ...(SHOWN[chosen] ?? [])]),
        yLabel: curve.text,
        levels: chosen in LEVELS ? [LEVELS[chosen]] : [],
        value: chosen === 'step/edge_ratio' ? verdict : valueOf,
      }).place,
    );
  };
  return { draw, move: () => places.forEach((place) => place()) };
}

/** @param {View} view */
function keysOf(view) {
  const found = new Set(view.shown.flatMap((run) => run.keys()).filter((key) => key.startsWith('step/')));
  const first = [...LOSSES, ...OTHERS].map(({ metric }) => metric).filter((metric) => found.has(metric));
  return [...new Set([...first, ...[...found].sort()])];
}

/** @param {string} metric */
const nameOf = (metric) => heading(metric.replace('step/', ''));

/**
 * The edge ratio, with what it says of the loss; or why there is none.
 * @param {import('../run.js').Run} run
 * @param {Curve} curve
 * @param {number} step
 */
export function verdict(run, curve, step) {
  const values = run.at(step)?.metrics ?? {};
  const ratio = values[curve.metric];
  if (ratio !== undefined)
    return `${valueOf(run, curve, step)}, ${ratio > 1 ? 'the step raised the loss' : 'the step lowered the loss'}`;
  const gain = values['step/gain'];
  return gain !== undefined && gain <= 0 ? '–, the step goes uphill' : '–';
}
