// The devices' memory over time, and the small charts of requests.

import { Chart } from "./chart.js";
import { clock, count, element, keyed, put, say, seconds, size } from "./format.js";

const until = (latest, samples) => samples.at(-1)?.t ?? latest.now;

// One card a device: who holds what, stacked up to its capacity. What could be given back is drawn fainter.
export class Memory {
  constructor(parent, lookOf) {
    Object.assign(this, { parent, lookOf, cards: new Map() });
  }

  render(latest, samples, range, events, askLimit) {
    const names = Object.keys(latest.devices);
    for (const name of this.cards.keys()) if (!names.includes(name)) this.cards.delete(name);
    keyed(this.parent, names.length ? names : [""], (name) => (name ? this.card(name, askLimit).node : element("div", { class: "card empty" }, "No device yet: its ledger comes with the first engine.")));
    for (const name of names) this.fill(this.cards.get(name), latest, samples, range, events);
  }

  card(name, askLimit) {
    const head = element("header", {}, element("h3", {}, name), element("span", { class: "muted" }));
    const body = element("tbody");
    const table = element("table", { class: "tenants" },
      element("caption", { class: "hidden" }, `Tenants of ${name}`),
      element("thead", {}, element("tr", {}, ...["Tenant", "In use", "Reclaimable", "Floor", "Limit"].map((text, i) => element("th", i === 3 ? { scope: "col", class: "wide" } : { scope: "col" }, text)))),
      body);
    const card = { name, body, askLimit, note: head.lastChild, at: null };
    card.chart = new Chart({
      label: `Memory of ${name} over time`,
      height: 230,
      format: size,
      binary: true,
      describe: (index) => this.describe(card, index),
      moved: (index) => { card.at = index; this.numbers(card); },
    });
    card.node = element("article", { class: "card device" }, head, card.chart.node, table);
    this.cards.set(name, card);
    return card;
  }

  fill(card, latest, samples, range, events) {
    const device = latest.devices[card.name];
    card.device = device;
    card.models = latest.models;
    if (!device) { say(card.note, "its ledger cannot be read: see the gateway's log"); return; }
    card.samples = samples.filter((sample) => sample.devices[card.name]);
    card.tenants = this.order(latest, card);
    const value = (name, which) => card.samples.map((sample) => sample.devices[card.name].tenants[name]?.[which] ?? 0);
    const outside = card.samples.map((sample) => sample.devices[card.name].outside);
    const series = card.tenants.flatMap((name) => [
      { look: this.lookOf(name), style: "area", values: value(name, 0) },
      { look: `${this.lookOf(name)} idle`, style: "area", values: value(name, 1) },
    ]);
    if (outside.some(Boolean)) series.unshift({ look: "cx outside", style: "area", values: outside });
    const marks = events.filter((event) => event.kind === "hand-over" && event.device === card.name).map((event) => event.t);
    card.chart.draw({ times: card.samples.map((sample) => sample.t), series, range, until: until(latest, samples), marks, most: device.capacity });
  }

  // Those of models in the models' order, then the others by name; those that only were there in between, too.
  order(latest, card) {
    const found = new Set(card.samples.flatMap((sample) => Object.keys(sample.devices[card.name].tenants)));
    for (const tenant of card.device.tenants) found.add(tenant.name);
    const first = latest.models.flatMap((model) => model.tenants).filter((name) => found.has(name));
    return [...new Set([...first, ...[...found].sort()])];
  }

  // The table under the chart: as things are now, or as they were at the cursor.
  numbers(card) {
    if (!card.device) return;
    const sample = card.at === null ? card.samples.at(-1) : card.samples[card.at];
    const held = sample ? sample.devices[card.name] : { tenants: {}, outside: 0 };
    const sum = Object.values(held.tenants).reduce((all, [used, idle]) => all + used + idle, 0);
    const others = held.outside ? `, ${size(held.outside)} outside elastickv` : "";
    say(card.note, `${card.at === null ? "now" : clock(sample.t)}: ${size(sum)} of ${size(card.device.capacity)}${others}`);
    if (!card.tenants.length) {
      keyed(card.body, [""], () => element("tr", {}, element("td", { colspan: "5", class: "nobody" }, "No tenant yet.")));
      return;
    }
    const rows = keyed(card.body, card.tenants, (name) => this.row(card, name));
    rows.forEach((row, i) => {
      const name = card.tenants[i];
      const [used, idle] = held.tenants[name] ?? [0, 0];
      const now = card.device.tenants.find((tenant) => tenant.name === name);
      const limit = !now ? "" : now.limit_agreed ? size(now.limit) : `${size(now.limit_wanted)} ordered`;
      [size(used), size(idle), now?.floor ? size(now.floor) : "–", now?.limit === null && now.limit_agreed ? "–" : limit]
        .forEach((text, place) => say(row.children[place + 1].firstChild, text));
      put(row.firstChild, "title", now ? `${name}: ${now.alive ? now.engine || "running" : "not running"}` : `${name}: gone`);
    });
  }

  row(card, name) {
    const cells = [0, 1, 2, 3].map((place) => element("td", place === 2 ? { class: "wide" } : {}, element("span")));
    if (!card.models.some((model) => model.tenants.includes(name))) {
      const button = element("button", { type: "button", "aria-label": `Limit of ${name}` }, "Limit…");
      button.addEventListener("click", () => card.askLimit([name]));
      cells[3].append(" ", button);
    }
    return element("tr", {}, element("th", { scope: "row" }, element("span", { class: `swatch ${this.lookOf(name)}` }), name), ...cells);
  }

  describe(card, index) {
    const sample = card.samples[index];
    const parts = Object.entries(sample.devices[card.name].tenants).map(([name, [used, idle]]) => `${name} ${size(used)} in use, ${size(idle)} reclaimable`);
    return `${clock(sample.t)}: ${parts.join("; ") || "no tenant"}`;
  }
}

// Tokens a second, waiting requests, TTFT and TPOT.
export class Requests {
  constructor(parent, lookOf) {
    this.lookOf = lookOf;
    this.charts = [
      this.add(parent, "Tokens/s, by model", count, (value) => `${count(value)} tokens/s`),
      this.add(parent, "Waiting, by model", count, (value) => `${count(value)} waiting`),
      this.add(parent, "TTFT, P50 and P99", seconds, null),
      this.add(parent, "TPOT, P50 and P99", seconds, null),
    ];
  }

  add(parent, label, format, total) {
    const note = element("span", { class: "muted" });
    const one = { note, samples: [], series: [] };
    const text = (index) => {
      const at = index ?? one.samples.length - 1;
      if (at < 0) return "";
      const values = one.series.map((line) => line.values[at] ?? null);
      return total ? total(values.reduce((all, value) => all + (value ?? 0), 0)) : values.map(seconds).join(", ");
    };
    one.chart = new Chart({
      label,
      height: 130,
      format,
      describe: (index) => `${clock(one.samples[index].t)}: ${text(index)}`,
      moved: (index) => say(note, text(index)),
    });
    parent.append(element("article", { class: "card small" }, element("header", {}, element("h3", {}, label), note), one.chart.node));
    return one;
  }

  render(latest, samples, range) {
    const areas = (which) => latest.models.map((model) => ({
      look: this.lookOf(model.name), style: "area", values: samples.map((sample) => sample.models[model.name]?.[which] ?? 0),
    }));
    const lines = (first) => ["c0", "c0 faint"].map((look, i) => ({
      look, style: "line", values: samples.map((sample) => sample.latency[first + i]),
    }));
    const all = [areas(0), areas(1), lines(0), lines(2)];
    all.forEach((series, i) => {
      const one = this.charts[i];
      Object.assign(one, { series, samples });
      one.chart.draw({ times: samples.map((sample) => sample.t), series, range, until: until(latest, samples), top: i === 1 ? 4 : 0 });
    });
  }
}
