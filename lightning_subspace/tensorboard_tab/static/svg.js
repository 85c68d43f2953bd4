/** Elements of the page, with attributes and a parent. */

const KINDS = new Set(['svg', 'g', 'path', 'line', 'circle', 'rect', 'text', 'clipPath', 'title', 'image', 'defs']);

/**
 * Make an element.
 * @param {string} kind - its name, in SVG where that has one
 * @param {Record<string, string | number | null | undefined>} [attributes] - those of null are left out
 * @param {Element | null} [parent] - to be appended to
 * @param {string | null} [text]
 * @returns {any}
 */
export function make(kind, attributes = {}, parent = null, text = null) {
  const node = KINDS.has(kind)
    ? document.createElementNS('http://www.w3.org/2000/svg', kind)
    : document.createElement(kind);
  set(node, attributes);
  if (text !== null) node.textContent = text;
  parent?.appendChild(node);
  return node;
}

/**
 * Set attributes of an element.
 * @param {Element} node
 * @param {Record<string, string | number | null | undefined>} attributes
 */
export function set(node, attributes) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(key, String(value));
  }
}
