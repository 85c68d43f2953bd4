/**
 * The page around the tab: TensorBoard's messages, its dark mode, and the part of the address behind "#".
 *
 * A tab of TensorBoard is a frame of the same origin. The messages are experimental, so everything works without an
 * answer; a page that stands alone has no host, and uses its own address, also in a frame of somebody else's page.
 */

/** The window of TensorBoard; null for a page that holds its data. */
const host = window.parent === window || document.getElementById('probes') ? null : window.parent;

/**
 * Ask TensorBoard for its runs, and hear when it has read its logs again.
 * @param {() => void} onReload
 */
export function connect(onReload) {
  /** @type {Map<number, (payload: any) => void>} */
  const waiting = new Map();
  const channel = new MessageChannel();
  let count = 0;
  /** @param {Record<string, unknown>} message */
  const post = (message) => channel.port1.postMessage(JSON.stringify({ error: null, ...message }));
  channel.port1.onmessage = (event) => {
    const message = JSON.parse(event.data);
    if (message.isReply) {
      waiting.get(message.id)?.(message.payload);
      waiting.delete(message.id);
      return;
    }
    post({ type: message.type, id: message.id, payload: null, isReply: true });
    if (message.type === 'experimental.DataReloaded') onReload();
  };
  host?.postMessage('experimental.bootstrap', '*', [channel.port2]);
  return {
    /** Names of all runs, ours or not, in the order in which TensorBoard deals colours; none without an answer. */
    runs: () =>
      new Promise((/** @type {(names: string[]) => void} */ resolve) => {
        if (!host) {
          resolve([]);
          return;
        }
        waiting.set(count, (payload) => resolve(payload ?? []));
        post({ type: 'experimental.GetRuns', id: count++, payload: null, isReply: false });
        setTimeout(() => resolve([]), 500);
      }),
  };
}

/**
 * Tell whether it is dark now, and whenever that changes.
 * @param {(dark: boolean) => void} callback
 */
export function onDark(callback) {
  if (host) {
    const body = host.document.body;
    const look = () => callback(body.classList.contains('dark-mode'));
    new MutationObserver(look).observe(body, { attributes: true, attributeFilter: ['class'] });
    look();
    return;
  }
  const dark = matchMedia('(prefers-color-scheme: dark)');
  dark.addEventListener('change', () => callback(dark.matches));
  callback(dark.matches);
}

/**
 * What is kept in the address: pairs behind the name of the tab.
 * @returns {URLSearchParams}
 */
export function readAddress() {
  const [, ...rest] = (host ?? window).location.hash
    .replace(/^#/, '&')
    .split('&')
    .slice(host ? 1 : 0);
  return new URLSearchParams(rest.join('&'));
}

/**
 * Put a view into the address, without a step in the history of the browser.
 * @param {URLSearchParams} pairs
 */
export function writeAddress(pairs) {
  const { location, history } = host ?? window;
  const tab = host ? location.hash.replace(/^#/, '').split('&')[0] : '';
  const hash = [tab, pairs.toString()].filter(Boolean).join('&');
  try {
    history.replaceState(history.state, '', `${location.pathname}${location.search}${hash ? `#${hash}` : ''}`);
  } catch {
    // A page within a mail or a notebook may have an address that cannot be changed; it works without.
  }
}
