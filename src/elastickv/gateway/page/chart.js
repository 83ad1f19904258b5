// A chart of what changed over time, as SVG: stacked areas or lines, and a cursor for the pointer and the arrow keys.

import { clock, element, put } from "./format.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const LEFT = 58;
const RIGHT = 8;
const TOP = 10;
const BOTTOM = 20;
const GAP_S = 4; // samples further apart than this are not joined

function shape(tag, attributes, text) {
  const node = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Steps of 1, 2 or 5 times a power of ten, or for bytes of a power of two; at most `most` of them up to `top`.
function step(top, most, binary) {
  if (!(top > 0)) return 1;
  if (binary) return 2 ** Math.ceil(Math.log2(top / most));
  const base = 10 ** Math.floor(Math.log10(top / most));
  return [1, 2, 5, 10].map((factor) => factor * base).find((one) => one * most >= top * 0.999999);
}

export class Chart {
  // label: what it shows. format(value): text of an axis. describe(index): text of a sample, for the cursor.
  // moved(index or null): the cursor is elsewhere.
  constructor({ label, height, format, describe, moved, binary = false }) {
    Object.assign(this, { label, height, format, describe, moved, binary });
    this.data = null;
    this.time = null; // of the sample at the cursor, null without a cursor
    this.pointer = null; // the x of the pointer over the chart
    this.node = element("div", { class: "chart", role: "slider", tabindex: "0", "aria-orientation": "horizontal" });
    this.node.setAttribute("aria-label", `${label}; the arrow keys go through time`);
    this.svg = shape("svg", { height, "aria-hidden": "true", focusable: "false" });
    this.node.append(this.svg);
    this.node.addEventListener("pointermove", (event) => this.point(event.clientX));
    this.node.addEventListener("pointerleave", () => this.leave());
    this.node.addEventListener("blur", () => this.leave());
    this.node.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.paint()).observe(this.node);
  }

  // times: Unix seconds, ascending. series: [{name, look, style, values}]; style is "area" (stacked in order), "line".
  // marks: times to be marked. top: what the axis must reach at least. most: a line, such as a capacity.
  draw(data) {
    this.data = data;
    if (this.pointer !== null) this.time = this.nearest(this.pointer);
    this.quiet = document.activeElement === this.node; // no new text every second for who listens to it
    this.paint();
    this.quiet = false;
  }

  get index() {
    if (this.time === null || !this.data) return null;
    const place = this.data.times.indexOf(this.time);
    return place < 0 ? null : place;
  }

  point(clientX) {
    this.pointer = clientX - this.node.getBoundingClientRect().left;
    this.time = this.nearest(this.pointer);
    this.paint();
  }

  leave() {
    this.pointer = null;
    this.time = null;
    this.paint();
  }

  key(event) {
    const last = this.data ? this.data.times.length - 1 : -1;
    if (last < 0) return;
    const by = event.shiftKey ? 10 : 1;
    const at = this.index ?? last;
    const to = { ArrowLeft: at - by, ArrowRight: at + by, Home: 0, End: last, PageUp: at + 30, PageDown: at - 30 }[event.key];
    if (event.key === "Escape") this.leave();
    if (to === undefined) return;
    event.preventDefault();
    this.pointer = null;
    this.time = this.data.times[Math.min(last, Math.max(0, to))];
    this.paint();
  }

  nearest(x) {
    if (!this.data || !this.data.times.length) return null;
    const wanted = this.data.until - this.data.range + ((x - LEFT) / this.width()) * this.data.range;
    return this.data.times.reduce((best, one) => (Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best));
  }

  width() {
    return Math.max(1, this.node.clientWidth - LEFT - RIGHT);
  }

  paint() {
    if (!this.data || !this.node.clientWidth) return;
    const { times, series, range, until, marks = [], most } = this.data;
    const stacked = series.filter((one) => one.style === "area");
    const floors = stack(stacked, times.length);
    const highest = Math.max(this.data.top || 0, most || 0, ...floors.at(-1), ...lineValues(series));
    const width = this.width();
    const x = (time) => LEFT + ((time - until + range) / range) * width;
    const inner = this.height - TOP - BOTTOM;
    const ticks = step(highest, inner > 100 ? 4 : 2, this.binary);
    const ceiling = most && this.binary ? highest : Math.max(ticks, Math.ceil(highest / ticks) * ticks);
    const y = (value) => TOP + inner * (1 - value / ceiling);
    const parts = [...this.axes(ticks, ceiling, x, y)];
    const runs = split(times);
    stacked.forEach((one, number) => {
      const outline = runs.map((run) => band(run, times, floors[number], floors[number + 1], x, y)).join("");
      parts.push(shape("path", { class: `area ${one.look}`, d: outline }));
      const edge = runs.map((run) => path(run, times, floors[number + 1], x, y)).join("");
      parts.push(shape("path", { class: "edge", d: edge }));
    });
    for (const one of series.filter((other) => other.style === "line")) {
      const outline = split(times, one.values).map((run) => path(run, times, one.values, x, y)).join("");
      parts.push(shape("path", { class: `line ${one.look}`, d: outline }));
    }
    if (most) parts.push(shape("line", { class: "most", x1: LEFT, x2: LEFT + width, y1: y(most), y2: y(most) }));
    for (const mark of marks.filter((time) => time > until - range)) {
      parts.push(shape("line", { class: "mark", x1: x(mark), x2: x(mark), y1: TOP, y2: TOP + inner }));
      parts.push(shape("path", { class: "mark-head", d: `M${x(mark) - 4} ${TOP - 6}h8l-4 6z` }));
    }
    const at = this.index;
    if (at !== null) parts.push(shape("line", { class: "cursor", x1: x(times[at]), x2: x(times[at]), y1: TOP, y2: TOP + inner }));
    this.svg.replaceChildren(...parts);
    this.tell(at);
  }

  * axes(ticks, ceiling, x, y) {
    const { until, range } = this.data;
    const right = LEFT + this.width();
    for (let value = 0; value <= ceiling * 1.0001; value += ticks) {
      yield shape("line", { class: "grid", x1: LEFT, x2: right, y1: y(value), y2: y(value) });
      yield shape("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, this.format(value));
    }
    const places = this.width() > 420 ? 4 : 2;
    for (let place = 0; place <= places; place += 1) {
      const time = until - range + (range * place) / places;
      const anchor = place === 0 ? "start" : place === places ? "end" : "middle";
      yield shape("text", { x: x(time), y: this.height - 5, "text-anchor": anchor }, clock(time));
    }
  }

  tell(at) {
    this.moved(at);
    if (this.quiet) return;
    const last = this.data.times.length - 1;
    put(this.node, "aria-valuemin", "0");
    put(this.node, "aria-valuemax", String(Math.max(0, last)));
    put(this.node, "aria-valuenow", String(Math.max(0, at ?? last)));
    put(this.node, "aria-valuetext", last < 0 ? "nothing yet" : this.describe(at ?? last));
  }
}

// floors[i] is where the i-th area begins, floors[i + 1] where it ends.
function stack(series, length) {
  const floors = [new Array(length).fill(0)];
  for (const one of series) floors.push(floors.at(-1).map((below, i) => below + (one.values[i] || 0)));
  return floors;
}

function lineValues(series) {
  return series.filter((one) => one.style === "line").flatMap((one) => one.values.filter((value) => value !== null));
}

// Runs [from, to] of samples that follow each other without a gap, and without a value that is missing.
function split(times, values) {
  const runs = [];
  times.forEach((time, i) => {
    if (values && (values[i] === null || values[i] === undefined)) return;
    const run = runs.at(-1);
    if (run && run[1] === i - 1 && time - times[i - 1] < GAP_S) run[1] = i;
    else runs.push([i, i]);
  });
  return runs;
}

function path([from, to], times, values, x, y) {
  let text = "";
  for (let i = from; i <= to; i += 1) text += `${i === from ? "M" : "L"}${x(times[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`;
  return from === to ? `${text}h1` : text;
}

function band([from, to], times, below, above, x, y) {
  let text = path([from, to], times, above, x, y);
  if (from === to) return "";
  for (let i = to; i >= from; i -= 1) text += `L${x(times[i]).toFixed(1)} ${y(below[i]).toFixed(1)}`;
  return `${text}Z`;
}
