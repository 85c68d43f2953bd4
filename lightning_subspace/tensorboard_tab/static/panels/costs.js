/** What the probes cost, and what their numbers rest on. */

import { card } from '../card.js';
import { duration, number, thousands } from '../format.js';
import { extent, median, present } from '../series.js';
import { make } from '../svg.js';

/** @typedef {import('../view.js').View} View */
/** @typedef {import('../run.js').Run} Run */

/** @type {{name: string, of: (run: Run) => string, says?: string}[]} */
const ROWS = [
  { name: 'probes', of: (run) => thousands(run.probes.length) },
  {
    name: 'left out',
    of: leftOut,
    says: 'undetermined: only eigenvalues are there; unconverged: nothing; failed: an exception',
  },
  {
    name: 'not verified',
    of: (run) => String(run.probes.filter((probe) => probe.verified === false).length),
    says: 'probes in which no search for missed eigenvalues was made',
  },
  {
    name: 'passed over',
    of: (run) => thousands(run.probes.at(-1)?.passed_over ?? 0),
    says: 'steps that max_overhead did not allow',
  },
  {
    name: 'products',
    of: (run) => {
      const products = run.metric('solver/matvecs');
      const middle = median(products);
      return middle === null ? '–' : `${thousands(sum(products))}, ${number(middle)} a probe`;
    },
    says: 'Hessian-vector products; the median',
  },
  { name: 'time', of: times, says: 'all probes; the first one; the median of the others' },
  {
    name: 'overhead',
    of: (run) => {
      const last = present(run.metric('solver/overhead')).at(-1);
      return last === undefined ? '–' : `${number(100 * last, 2)} % of the wall time`;
    },
  },
  { name: 'residual/gap', of: errors, says: 'above 0.1 shares and overlaps are left out' },
  {
    name: 'top space',
    of: space,
  },
  { name: 'sample', of: sample },
  {
    name: 'optimizer',
    of: (run) => {
      const rate = run.probes.findLast((probe) => probe.lr !== undefined)?.lr;
      return [run.header.optimizer, rate === undefined ? '' : `lr ${number(rate)}`].filter(Boolean).join(', ') || '–';
    },
  },
  {
    name: 'curvature',
    of: (run) => [run.header.curvature, run.header.mode, run.header.dtype].filter(Boolean).join(', ') || '–',
  },
  { name: 'processes', of: (run) => String(run.header.ranks ?? '–') },
];

/** @param {HTMLElement} host @returns {import('../card.js').Panel} */
export function costs(host) {
  /** @type {View} */
  let shown;
  const { node, body } = card(host, {
    name: 'costs',
    title: 'What it cost, and what it rests on',
    view: () => shown,
    lines: () => lines(shown),
    isTable: true,
  });
  body.classList.add('scroll');
  /** @param {View} view */
  const draw = (view) => {
    shown = view;
    node.classList.toggle('wide', view.shown.length > 2);
    body.replaceChildren();
    const table = make('table', {}, body);
    if (view.shown.length > 1) {
      const head = make('tr', {}, make('thead', {}, table));
      make('th', {}, head);
      for (const run of view.shown) {
        const cell = make('th', { scope: 'col' }, head);
        make('span', { class: 'dot', style: `background:${view.colour(run)}` }, cell);
        cell.append(` ${run.name}`);
      }
    }
    const rows = make('tbody', {}, table);
    for (const { name, of, says } of ROWS) {
      if (view.shown.every((run) => of(run) === '–')) continue;
      const row = make('tr', {}, rows);
      make('th', { title: says, scope: 'row' }, row, name);
      for (const run of view.shown) make('td', {}, row, of(run));
    }
  };
  return { draw, move: () => {} };
}

/** @param {(number | null)[]} values */
const sum = (values) => present(values).reduce((a, b) => a + b, 0);

/** @param {Run} run */
function leftOut(run) {
  const states = /** @type {const} */ (['undetermined', 'unconverged', 'failed']);
  const found = states.filter((state) => run.count(state)).map((state) => `${run.count(state)} ${state}`);
  return found.join(', ') || 'none';
}

/** @param {Run} run */
function space(run) {
  const { k = run.k, n, keep } = run.header;
  return [n ? `${k} of ${thousands(n)} directions` : String(k), keep ? `steps keep the ${keep}` : '']
    .filter(Boolean)
    .join(', ');
}

/** @param {Run} run */
function times(run) {
  const seconds = run.metric('solver/seconds');
  if (!present(seconds).length) return '–';
  const later = seconds.length > 1 ? `, later ${duration(median(seconds.slice(1)))}` : '';
  return `${duration(sum(seconds))}: first ${duration(seconds[0])}${later}`;
}

/** @param {Run} run */
function errors(run) {
  const known = present(run.metric('solver/subspace_error'));
  return known.length ? `${number(median(known), 2)}, at most ${number(extent(known)[1], 2)}` : '–';
}

/** @param {Run} run */
function sample(run) {
  const { sample: size, share } = run.header;
  if (!size) return '–';
  return `${thousands(size)} examples${share ? ` (${number(100 * share, 2)} %)` : ''}`;
}

/** @param {View} view */
const lines = (view) =>
  ROWS.map(({ name, of }) => ({ name, ...Object.fromEntries(view.shown.map((run) => [run.name, of(run)])) }));
