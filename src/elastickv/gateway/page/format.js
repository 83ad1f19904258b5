// Numbers and times as text, and small helpers for the document.

const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"];

export function size(bytes) {
  if (bytes === null || bytes === undefined) return "none";
  if (bytes === 0) return "0";
  let power = 0;
  let value = bytes;
  while (value >= 1024 && power < UNITS.length - 1) { value /= 1024; power += 1; }
  const text = value >= 100 || Number.isInteger(value) ? Math.round(value).toString() : value.toFixed(1).replace(/\.0$/, "");
  return `${text} ${UNITS[power]}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 0.01) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 1) return `${(value * 1e3).toFixed(0)} ms`;
  return value < 60 ? `${value.toFixed(value < 10 ? 2 : 1)} s` : duration(value);
}

export function duration(value) {
  const whole = Math.max(0, Math.floor(value));
  if (value < 10) return `${value.toFixed(1)} s`;
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return both(whole, 60, "min", "s");
  if (whole < 86400) return both(whole / 60, 60, "h", "min");
  return both(whole / 3600, 24, "d", "h");
}

function both(value, parts, large, small) {
  const rest = Math.floor(value % parts);
  return `${Math.floor(value / parts)} ${large}${rest ? ` ${rest} ${small}` : ""}`;
}

const TIME = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const NUMBER = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const PRECISE = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

export const clock = (unix) => TIME.format(new Date(unix * 1000));
export const count = (value) => (value < 10 ? PRECISE : NUMBER).format(value);
export const counted = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export const byId = (id) => document.getElementById(id);

// element("td", {class: "number"}, "text", child, …)
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Writes only what changed: selections, focus and what a screen reader is at stay as they are.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function put(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

// One child of `parent` for each key, in order: those that are there are kept.
export function keyed(parent, keys, make) {
  const have = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  const wanted = new Set(keys);
  for (const [key, node] of have) if (!wanted.has(key)) node.remove();
  keys.forEach((key, place) => {
    let node = have.get(key);
    if (!node) { node = make(key); node.dataset.key = key; }
    if (parent.children[place] !== node) parent.insertBefore(node, parent.children[place] || null);
  });
  return [...parent.children];
}
