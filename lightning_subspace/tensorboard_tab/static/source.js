/** Where probes come from: a TensorBoard that serves them, or this page itself, which holds them. */

import { unpacked } from './packed.js';
import { Run } from './run.js';

/**
 * @typedef {object} Source
 * @property {() => Promise<Record<string, Record<string, {v: number | null}>>>} runs - tags by run, with the schema
 * @property {(run: Run) => Promise<boolean>} update - takes what is new; whether there was any
 * @property {boolean} isLive - whether more may come
 */

/** @returns {Source} */
export function source() {
  const element = document.getElementById('probes');
  return element?.textContent ? embedded(JSON.parse(element.textContent)) : server();
}

/** @returns {Source} */
function server() {
  /** @param {string} path */
  const get = async (path) => {
    const answer = await fetch(path);
    if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
    return answer.json();
  };
  return {
    isLive: true,
    runs: async () => (await get('./runs')).runs,
    update: async (run) => {
      const query = new URLSearchParams({ run: run.name, tag: run.tag, after: String(run.last) });
      const { last, probes } = await get(`./probes?${query}`);
      run.last = last;
      run.add(probes.map(unpacked));
      return probes.length > 0;
    },
  };
}

/**
 * @param {Record<string, Record<string, import('./run.js').Probe[]>>} runs
 * @returns {Source}
 */
function embedded(runs) {
  const tags = Object.entries(runs).map(([run, byTag]) => [
    run,
    Object.fromEntries(Object.entries(byTag).map(([tag, probes]) => [tag, { v: probes[0]?.v ?? null }])),
  ]);
  return {
    isLive: false,
    runs: async () => Object.fromEntries(tags),
    update: async (run) => {
      if (run.probes.length) return false;
      run.add(runs[run.name][run.tag].map(unpacked));
      return true;
    },
  };
}
