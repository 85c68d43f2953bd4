/** The parts of the page around the panels: the list of runs, the bar of controls, and what is said without data. */

import { thousands } from './format.js';
import { nearest } from './series.js';
import { make } from './svg.js';

/** @typedef {import('./view.js').View} View */

/**
 * The list of runs: a click shows or hides one, a double click shows it alone.
 * @param {HTMLElement} host
 * @param {View} view
 */
export function runList(host, view) {
  host.replaceChildren();
  make('h2', {}, host, 'Runs');
  if (view.tags.length > 1) {
    const select = make('select', { 'aria-label': 'monitor' }, host);
    for (const tag of view.tags)
      make('option', { value: tag }, select, tag.replace(/\/probes$/, '')).selected = tag === view.tag;
    select.addEventListener('change', () =>
      view.change(() => {
        [view.tag, view.hidden] = [select.value, null];
      }),
    );
  }
  for (const run of view.listed) {
    const row = make(
      'label',
      { class: run === view.focused ? 'run focus' : 'run', title: 'double click: only this one' },
      host,
    );
    const box = make('input', { type: 'checkbox', 'aria-label': `show ${run.name}` }, row);
    box.checked = view.isVisible(run);
    box.addEventListener('change', () => view.toggle(run));
    make('span', { class: 'name' }, row, run.name);
    make('span', { class: 'dot', style: `background:${view.colour(run)}` }, row);
    row.addEventListener('click', (/** @type {Event} */ event) => {
      if (event.target === box) return;
      event.preventDefault(); // a click on the name says whose sentence is on top
      view.change(() => {
        view.focus = run.name;
      });
    });
    row.addEventListener('dblclick', () => view.showOnly(run));
    if (run.isNewer)
      make('p', { class: 'warn' }, host, 'written in part by a newer version: update lightning_subspace');
  }
}

/**
 * The bar of controls, which is built once: an element that is made anew loses the pointer that drags it.
 * @param {HTMLElement} host
 * @param {View} view
 * @returns {{fit: () => void, follow: () => void}} to be called when anything, and when the step has changed
 */
export function controls(host, view) {
  const slider = labelled(host, 'step', { type: 'range', min: 0, id: 'step' });
  const at = make('b', { id: 'at' }, slider.parentElement);
  slider.addEventListener('input', () => view.choose(view.steps[Number(slider.value)]));
  const count = labelled(host, 'eigenvalues', { type: 'range', min: 1, class: 'short', id: 'count' });
  const counted = make('b', {}, count.parentElement);
  count.addEventListener('input', () =>
    view.change(() => {
      view.limit = Number(count.value);
    }),
  );
  /** @type {[string, 'logarithmic' | 'logSteps' | 'still', string][]} */
  const properties = [
    ['log eigenvalues', 'logarithmic', 'eigenvalues on a logarithmic axis'],
    ['log steps', 'logSteps', 'steps on a logarithmic axis'],
    ['keep scale', 'still', "the spectrum's axis stays the same over the steps"],
  ];
  const boxes = properties.map(([text, property, says]) => {
    const box = labelled(host, text, { type: 'checkbox', title: says });
    box.addEventListener('change', () =>
      view.change(() => {
        view[property] = box.checked;
      }),
    );
    return { box, property };
  });
  const all = make('button', { type: 'button', class: 'chip' }, host, 'show all');
  all.addEventListener('click', () =>
    view.change(() => {
      [view.range, view.zooms] = [null, {}];
    }),
  );
  const fit = () => {
    slider.max = String(Math.max(view.steps.length - 1, 0));
    /** @type {HTMLElement} */ (count.parentElement).hidden = view.most < 2;
    count.max = String(view.most);
    count.value = String(view.count);
    counted.textContent = view.count < view.most ? `first ${view.count}` : `all ${view.most}`;
    for (const { box, property } of boxes) {
      box.checked = view[property];
      // Without eigenvalues there is no axis of theirs.
      /** @type {HTMLElement} */ (box.parentElement).hidden = property !== 'logSteps' && view.most === 0;
    }
    all.hidden = !view.isZoomed;
  };
  const follow = () => {
    const steps = view.steps;
    const index = nearest(steps, view.step);
    slider.value = String(index);
    at.textContent = steps.length
      ? `${thousands(view.step)} (${thousands(index + 1)} of ${thousands(steps.length)})`
      : '–';
  };
  return { fit, follow };
}

/**
 * What to do where nothing was measured yet.
 * @param {HTMLElement} host
 * @param {View} view
 */
export function emptiness(host, view) {
  host.replaceChildren();
  const box = make('div', { class: 'empty' }, host);
  if (view.runs.length) {
    make('p', {}, box, 'No run is shown: choose one on the left.');
    return;
  }
  make('p', {}, box, 'No probe has been written to these logs yet. Add the monitor to the Trainer that writes them:');
  make(
    'pre',
    {},
    box,
    'from lightning_subspace import SubspaceMonitor\n\ntrainer = Trainer(callbacks=[SubspaceMonitor()], logger=TensorBoardLogger("logs"))',
  );
  make(
    'p',
    {},
    box,
    'The first probe comes before the first step; this page shows it when TensorBoard reads its logs again.',
  );
}

/**
 * An input within its label.
 * @param {HTMLElement} host
 * @param {string} text
 * @param {Record<string, string | number>} attributes
 * @returns {HTMLInputElement}
 */
function labelled(host, text, attributes) {
  return make('input', attributes, make('label', {}, host, `${text} `));
}
