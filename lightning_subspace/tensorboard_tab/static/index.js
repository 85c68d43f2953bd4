/** The tab: takes runs and probes from their source, and tells the panels when to draw. */

import { connect, onDark } from './host.js';
import { controls, emptiness, runList } from './page.js';
import { atLoss } from './panels/at_loss.js';
import { costs } from './panels/costs.js';
import { density } from './panels/density.js';
import { eigenvalues } from './panels/eigenvalues.js';
import { layers } from './panels/layers.js';
import { noise } from './panels/noise.js';
import { others } from './panels/numbers.js';
import { overlapWith } from './panels/overlap_with.js';
import { overlaps } from './panels/overlaps.js';
import { projection } from './panels/projection.js';
import { shares } from './panels/shares.js';
import { spectrum } from './panels/spectrum.js';
import { taken } from './panels/taken.js';
import { words } from './panels/words.js';
import { Run } from './run.js';
import { source } from './source.js';
import { make } from './svg.js';
import { View } from './view.js';

const PANELS = [
  eigenvalues,
  spectrum,
  shares,
  overlapWith,
  projection,
  taken,
  overlaps,
  noise,
  others,
  layers,
  atLoss,
  density,
  costs,
];

/** Build the page, and keep it up to date. TensorBoard calls this when the tab is opened. */
export function render() {
  if (!document.querySelector('meta[name=viewport]'))
    make('meta', { name: 'viewport', content: 'width=device-width' }, document.head);
  if (!document.getElementById('style'))
    make('link', { rel: 'stylesheet', href: './static/style.css', id: 'style' }, document.head);
  const page = make('div', { id: 'page' }, document.body);
  const side = make('nav', { id: 'side', 'aria-label': 'runs' }, page);
  const main = make('main', { id: 'main' }, page);
  const bar = make('div', { id: 'bar' }, main);
  const empty = make('div', {}, main);
  const content = make('div', {}, main);
  const first = words(content);
  const grid = make('div', { id: 'grid' }, content);
  const panels = [first, ...PANELS.map((build) => build(grid))];
  let pending = 0;
  const view = new View({
    redraw,
    move: () => {
      cancelAnimationFrame(pending); // a slider that is dragged sends more events than can be drawn
      pending = requestAnimationFrame(move);
    },
  });
  const { fit, follow } = controls(bar, view);
  const from = source();
  const tensorBoard = connect(() => void update());

  function redraw() {
    const isEmpty = !view.shown.length;
    const label = document.activeElement?.getAttribute('aria-label');
    runList(side, view);
    bar.hidden = content.hidden = isEmpty;
    empty.replaceChildren();
    if (isEmpty) emptiness(empty, view);
    else {
      grid.classList.toggle('bare', view.most === 0);
      fit();
      for (const panel of panels) panel.draw(view);
      follow();
    }
    // An element that was made anew has the focus of the one that it replaces.
    if (label && document.activeElement === document.body)
      /** @type {HTMLElement | null} */ (document.querySelector(`[aria-label="${CSS.escape(label)}"]`))?.focus();
    document.body.dataset.ready = String(view.shown.length);
  }

  function move() {
    if (!view.shown.length) return;
    follow();
    for (const panel of panels) panel.move(view);
    document.body.dataset.step = String(view.step);
  }

  // New probes wait for a pointer that is pressed: what it drags would be made anew under it.
  let [isPressed, isLate] = [false, false];
  function refresh() {
    if (isPressed) isLate = true;
    else redraw();
  }
  document.addEventListener('pointerdown', () => (isPressed = true), true);
  for (const end of ['pointerup', 'pointercancel']) {
    document.addEventListener(end, () => {
      isPressed = false;
      if (isLate) setTimeout(redraw); // when the panel has taken the end of the drag
      isLate = false;
    });
  }

  async function update() {
    try {
      const [listed, order] = await Promise.all([from.runs(), tensorBoard.runs()]);
      const known = new Map(view.runs.map((run) => [`${run.name}\n${run.tag}`, run]));
      const names = Object.keys(listed).sort();
      const runs = names.flatMap((name) =>
        Object.keys(listed[name])
          .sort()
          .map((tag) => known.get(`${name}\n${tag}`) ?? new Run(name, tag)),
      );
      const isOther = runs.length !== view.runs.length || runs.some((run) => !view.runs.includes(run));
      const isNew = await Promise.all(runs.map((run) => from.update(run)));
      [view.runs, view.order] = [runs, order];
      view.settle();
      if (isOther || isNew.some(Boolean) || !document.body.dataset.ready) refresh();
    } catch (error) {
      make('p', { class: 'warn' }, side, `The data could not be read: ${error}`);
    }
  }

  document.addEventListener('keydown', (event) => {
    const isRange = event.target instanceof HTMLInputElement && event.target.type === 'range';
    if (isRange || event.target instanceof HTMLSelectElement) return; // they take these keys themselves
    const places = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity }[
      event.key
    ];
    if (places === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    view.advance(places === -Infinity ? -1e9 : places === Infinity ? 1e9 : places);
  });
  let width = 0;
  new ResizeObserver(() => {
    if (Math.abs(main.clientWidth - width) > 4) {
      width = main.clientWidth;
      if (document.body.dataset.ready) redraw();
    }
  }).observe(main);
  onDark((dark) => {
    document.documentElement.classList.toggle('dark', dark);
    view.dark = dark;
    if (document.body.dataset.ready) redraw();
  });
  void update();
}
