// The page of the gateway: asks /admin/watch once a second, draws what it says, and gives the orders of its buttons.

import { Memory, Requests } from "./panels.js";
import { byId, clock, count, counted, duration, element, keyed, put, say, seconds, size } from "./format.js";

const KEEP_S = 900;
const LATE_MS = 3500;
const SLOWEST_MS = 5000;

const seen = { run: null, n: 0, samples: [], events: [], latest: null };
const busy = new Map(); // model: what it is being told to do
const colours = new Map(); // model or tenant: number of its colour
const memory = new Memory(byId("devices"), lookOf);
const requests = new Requests(byId("requests"), lookOf);
let answeredAt = performance.now();
let failures = 0;
let timer = 0;
let asking = false;
let again = false;
let refused = "";
let wantsKey = false;

// ---- what is asked ----

const key = () => sessionStorage.getItem("elastickv-key") || "";

async function ask(path, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(key() ? { Authorization: `Bearer ${key()}` } : {}) };
  const answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const text = await answer.text();
  let message = text.slice(0, 300);
  try { message = JSON.parse(text).error.message; } catch { /* no body of ours: its text says it */ }
  const error = new Error(message || `the gateway answered ${answer.status}`);
  error.status = answer.status;
  throw error;
}

// One question at a time; `again` asks once more right after the one that is under way.
async function poll() {
  if (asking) { again = true; return; }
  asking = true;
  clearTimeout(timer);
  try {
    take(await ask(`/admin/watch?since=${seen.n}`, { signal: AbortSignal.timeout(SLOWEST_MS) }));
    failures = 0;
    refused = "";
    wantsKey = false;
    answeredAt = performance.now();
  } catch (error) {
    failures += 1;
    wantsKey = error.status === 401;
    if (wantsKey || error.status === 403) refused = error.message;
  }
  asking = false;
  showLink();
  const interval = (seen.latest?.interval ?? 1) * 1000;
  const pause = failures ? Math.min(SLOWEST_MS, interval * 2 ** Math.min(failures - 1, 4)) : interval;
  timer = setTimeout(poll, again ? 0 : pause);
  again = false;
}

function take(answer) {
  if (seen.run !== answer.run) { // another gateway than before: its numbers begin anew
    const stale = seen.n > 0;
    Object.assign(seen, { run: answer.run, n: 0, samples: [], events: [] });
    if (stale) { again = true; return; }
  }
  seen.n = answer.n;
  seen.latest = answer;
  seen.samples.push(...answer.samples);
  seen.events.push(...answer.events);
  seen.samples = seen.samples.filter((sample) => sample.t >= answer.now - KEEP_S);
  seen.events = seen.events.slice(-400);
  render();
}

// ---- how the link to the gateway is ----

function showLink() {
  const quiet = performance.now() - answeredAt;
  const last = seen.samples.at(-1);
  const sampled = !last || seen.latest.now - last.t < 5 * seen.latest.interval + 5;
  const lost = Boolean(refused) || quiet > LATE_MS;
  const from = last ? `What you see is from ${clock(last.t)}.` : "";
  let text = "";
  if (refused) text = `The gateway does not show its state: ${refused}. ${from}`;
  else if (lost) text = `No answer from the gateway for a while. ${from} Trying again.`;
  else if (!sampled) text = `The gateway answers, but has read no ledger since ${clock(last.t)}: see its log.`;
  document.body.classList.toggle("stale", Boolean(text) && Boolean(last));
  put(byId("link"), "class", `link ${text ? "lost" : failures || !seen.latest ? "" : "live"}`);
  say(byId("link-text"), text ? "not connected" : seen.latest ? "live" : "connecting");
  const banner = byId("banner");
  if (banner.dataset.text !== text) { // announced once, not every second
    banner.dataset.text = text;
    banner.replaceChildren(text);
    if (wantsKey) {
      const button = element("button", { type: "button" }, "Enter the key");
      button.addEventListener("click", askKey);
      banner.append(button);
    }
    banner.hidden = !text;
    renderModels();
  }
}

const connected = () => !document.body.classList.contains("stale") && byId("banner").hidden;

// ---- what is shown ----

function lookOf(name) {
  const model = seen.latest?.models.find((one) => one.name === name || one.tenants.includes(name));
  const whose = model ? model.name : name;
  if (!colours.has(whose)) colours.set(whose, colours.size % 8);
  return `c${colours.get(whose)}`;
}

function render() {
  const { latest, samples, events } = seen;
  const range = Number(byId("range").value);
  const end = samples.at(-1)?.t ?? latest.now;
  const shown = samples.filter((sample) => sample.t >= end - range);
  for (const model of latest.models) lookOf(model.name);
  say(byId("version"), latest.version);
  renderTiles(latest);
  memory.render(latest, shown, range, events, askLimit);
  renderEvents(events);
  renderModels();
  requests.render(latest, shown, range);
}

function renderTiles({ devices, models, total }) {
  const known = Object.entries(devices).filter(([, device]) => device);
  const held = known.reduce((sum, [, device]) => sum + device.tenants.reduce((all, one) => all + one.held, 0), 0);
  const capacity = known.reduce((sum, [, device]) => sum + device.capacity, 0);
  const ready = models.filter((model) => model.state === "ready").length;
  const others = ["starting", "waking", "draining", "asleep", "stopped", "failed"]
    .map((state) => [state, models.filter((model) => model.state === state).length])
    .filter(([, number]) => number)
    .map(([state, number]) => `${number} ${state}`);
  const sum = (name) => models.reduce((all, model) => all + model[name], 0);
  const where = known.length === 1 ? "" : ` on ${known.length} devices`;
  const tiles = [
    ["Memory held", size(held), capacity ? `${count((100 * held) / capacity)} % of ${size(capacity)}${where}` : "no device yet"],
    ["Models ready", `${ready} of ${models.length}`, others.join(", ") || "none asleep"],
    ["Requests running", count(sum("outstanding")), `${count(sum("queued"))} waiting, ${count(total.failed)} of ${count(total.requests)} failed`],
    ["Tokens/s", count(total.tokens_per_s), `${count(total.output_tokens)} in all`],
    ["TTFT, P50", seconds(total.ttft.p50), `P99 ${seconds(total.ttft.p99)}, ${counted(total.ttft.count, "answer")}`],
    ["TPOT, P50", seconds(total.tpot.p50), `P99 ${seconds(total.tpot.p99)}, ${counted(total.tpot.count, "answer")}`],
  ];
  const nodes = keyed(byId("summary"), tiles.map(([name]) => name), (name) =>
    element("div", {}, element("dt", {}, name), element("dd"), element("dd", { class: "more" })));
  nodes.forEach((node, i) => {
    say(node.children[1], tiles[i][1]);
    say(node.children[2], tiles[i][2]);
    put(node.children[2], "title", tiles[i][2]);
  });
}

function renderEvents(events) {
  const list = byId("events");
  const newest = events.slice(-100).reverse();
  if (!newest.length) {
    keyed(list, ["none"], () => element("li", { class: "none" }, "Nothing has moved yet."));
    return;
  }
  const of = new Map(newest.map((event) => [nameOf(event), event]));
  keyed(list, [...of.keys()], (name) => eventLine(of.get(name)));
}

const nameOf = (event) => `${event.n} ${event.t} ${event.kind} ${event.model ?? event.device} ${event.to ?? ""}`;

function eventLine(event) {
  const bold = (name) => element("b", {}, name);
  const when = element("time", { datetime: new Date(event.t * 1000).toISOString() }, clock(event.t));
  if (event.kind === "move") {
    const text = `${event.reason}${event.lasted >= 0.1 ? `, after ${duration(event.lasted)} ${event.origin}` : ""}`;
    return element("li", {}, when, element("span", {}, bold(event.model), ` ${event.origin} → ${event.to}`, element("span", { class: "why" }, text)));
  }
  const givers = Object.entries(event.givers);
  const takers = Object.entries(event.takers).sort((one, other) => other[1] - one[1]);
  const named = (entries) => entries.flatMap(([name], i) => [i ? ", " : "", bold(name)]);
  const to = takers.length ? [" to ", ...named(takers)] : [];
  const why = takers.map(([name, bytes]) => (bytes ? `${name} holds ${size(bytes)} more` : `${name} waits`)).join(", ");
  return element("li", {}, when, element("span", {}, ...named(givers), ` gave ${size(event.bytes)}`, ...to, element("span", { class: "why" }, why || event.device)));
}

const SHAPES = { // a form for each state, so that colour is not all there is
  ready: "M6 1a5 5 0 1 0 0 10A5 5 0 0 0 6 1z",
  asleep: "M8.5 8.6A4.6 4.6 0 0 1 4.1 1.6a5 5 0 1 0 6.4 6.4 4.6 4.6 0 0 1-2 .6z",
  stopped: "M2.5 2.5h7v7h-7z",
  failed: "M6 1l5.2 9.4H.8z",
  starting: "M3 1.5l7 4.5-7 4.5z",
  waking: "M3 1.5l7 4.5-7 4.5z",
  draining: "M2 1.5h2.6v9H2zM7.4 1.5H10v9H7.4z",
};

function modelRow(name) {
  const svg = new DOMParser().parseFromString(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 12 12" aria-hidden="true"><path d="M0 0"/></svg>`, "image/svg+xml").documentElement;
  const cell = (attributes, ...children) => element("td", attributes, ...children);
  const act = element("button", { type: "button" });
  const limit = element("button", { type: "button", "aria-label": `Limit of ${name}` }, "Limit…");
  act.addEventListener("click", () => pressed(name));
  limit.addEventListener("click", () => askLimit(modelOf(name)?.tenants ?? []));
  return element("tr", {},
    element("th", { scope: "row" }, element("span", { class: `swatch ${lookOf(name)}` }), name, element("span", { class: "sub" })),
    cell({ class: "condition" }, element("span", { class: "state" }, document.importNode(svg, true), element("span"), element("span", { class: "age" })), element("span", { class: "sub reason" })),
    cell({ class: "number", "data-label": "Running, waiting" }),
    cell({ class: "number", "data-label": "Tokens/s" }),
    cell({ class: "number", "data-label": "TTFT P50, P99" }),
    cell({ class: "number", "data-label": "TPOT P50, P99" }),
    cell({ class: "memory" }, element("span", { class: "sub" }), element("span", { class: "meter", "aria-hidden": "true" }), element("span", { class: "sub" })),
    cell({ class: "actions" }, act, limit));
}

function renderModels() {
  if (!seen.latest) return;
  const { models } = seen.latest;
  byId("no-models").hidden = models.length > 0;
  const rows = keyed(byId("models"), models.map((model) => model.name), modelRow);
  rows.forEach((row, i) => fillRow(row, models[i]));
}

const POLICIES = { pressure: "sleeps under pressure", idle: "sleeps when idle", never: "never sleeps" };

function fillRow(row, model) {
  const [head, condition, load, tokens, ttft, tpot, held, actions] = row.children;
  const { stats } = model;
  say(head.lastChild, model.replicas === 1 ? POLICIES[model.policy] ?? model.policy : `${model.ready} of ${model.replicas} replicas ready`);
  const state = condition.firstChild;
  put(state, "class", `state ${model.state}`);
  put(state.querySelector("path"), "d", SHAPES[model.state] || SHAPES.ready);
  say(state.children[1], model.state);
  say(state.lastChild, `for ${duration(Math.max(0, seen.latest.now - model.since))}`);
  say(condition.lastChild, model.reason);
  say(load, `${count(model.outstanding)}, ${count(model.queued)}`);
  say(tokens, count(stats.tokens_per_s));
  say(ttft, stats.ttft.count ? `${seconds(stats.ttft.p50)}, ${seconds(stats.ttft.p99)}` : "–");
  say(tpot, stats.tpot.count ? `${seconds(stats.tpot.p50)}, ${seconds(stats.tpot.p99)}` : "–");
  fillMemory(held, model);
  const [act, limit] = actions.children;
  const doing = busy.get(model.name);
  const verb = verbOf(model.state);
  say(act, doing || verb || "…");
  put(act, "aria-label", `${doing || verb || model.state} ${model.name}`);
  put(act, "aria-disabled", String(Boolean(doing) || !verb || !connected()));
  put(limit, "aria-disabled", String(!tenantsOf(model.tenants).length || !connected()));
}

const verbOf = (state) => ({ ready: "Sleep", asleep: "Wake", stopped: "Start", failed: "Start" })[state];

function fillMemory(cell, model) {
  const found = tenantsOf(model.tenants);
  const whole = found.reduce((most, [device]) => Math.max(most, device.capacity), 0);
  const add = (name) => found.reduce((all, [, one]) => all + one.parts[name], 0);
  const used = add("static") + add("used") + add("transit");
  const idle = add("cached") + add("mapped_free");
  const limit = found.length === 1 ? found[0][1].limit : null;
  const text = found.length ? used + idle ? `${size(used)} in use, ${size(idle)} reclaimable` : "holds nothing" : "nothing on the ledger";
  const ordered = found.length === 1 && !found[0][1].limit_agreed;
  say(cell.firstChild, text);
  say(cell.children[2], ordered ? `limit ${size(found[0][1].limit_wanted)} ordered` : limit === null ? "no limit" : `limit ${size(limit)}`);
  const look = lookOf(model.name);
  const bars = keyed(cell.children[1], ["used", "idle", ...(limit === null ? [] : ["limit"])], (name) =>
    element(name === "limit" ? "u" : "i", { class: `${look} ${name === "idle" ? "idle" : ""}` }));
  const percent = (bytes) => `${whole ? Math.min(100, (100 * bytes) / whole) : 0}%`;
  bars[0].style.width = percent(used);
  bars[1].style.width = percent(idle);
  if (bars[2]) bars[2].style.left = `min(${percent(limit)}, calc(100% - 2px))`;
}

const modelOf = (name) => seen.latest.models.find((model) => model.name === name);

// [device, tenant, the device's name] of each of the names that is on a ledger.
function tenantsOf(names) {
  return Object.entries(seen.latest.devices).flatMap(([place, device]) =>
    (device?.tenants ?? []).filter((tenant) => names.includes(tenant.name)).map((tenant) => [device, tenant, place]));
}

// ---- orders ----

// Opens a dialog; true if its form was sent. The focus goes back to where it was.
function open(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => done(dialog.returnValue === "ok"), { once: true }));
}

let toast = 0;

function tell(text) {
  clearTimeout(toast);
  say(byId("said"), text);
  toast = setTimeout(() => say(byId("said"), ""), 8000);
}

async function askKey() {
  byId("key-text").value = "";
  if (!(await open(byId("ask-key")))) return;
  sessionStorage.setItem("elastickv-key", byId("key-text").value);
  poll();
}

async function pressed(name) {
  const model = modelOf(name);
  const verb = model && verbOf(model.state);
  if (!verb || busy.has(name) || !connected()) return;
  if (verb === "Sleep") {
    const open_requests = model.outstanding + model.queued;
    say(byId("ask-sleep-title"), `Put ${name} to sleep?`);
    say(byId("ask-sleep-text"), `${open_requests ? `${counted(open_requests, "request")} will end first. ` : ""}Its weights leave the device and its cached prefixes are dropped. The next request wakes it.`);
    if (!(await open(byId("ask-sleep")))) return;
  }
  const way = verb === "Sleep" ? "sleep" : "wake";
  busy.set(name, verb === "Sleep" ? "Sleeping…" : verb === "Wake" ? "Waking…" : "Starting…");
  renderModels();
  try {
    await ask(`/admin/models/${encodeURIComponent(name)}/${way}`, { method: "POST", body: "{}" });
    tell(way === "sleep" ? `${name} sleeps.` : `${name} is ready.`);
  } catch (error) {
    tell(`${name} did not ${way}: ${error.message}`);
  } finally {
    busy.delete(name);
    poll();
  }
}

async function askLimit(names) {
  const found = tenantsOf(names);
  if (!found.length || !connected()) return;
  const dialog = byId("ask-limit");
  const chosen = byId("limit-tenant");
  chosen.replaceChildren(...found.map(([, tenant, device], i) => element("option", { value: i }, `${tenant.name} on ${device}`)));
  byId("limit-tenant-label").hidden = found.length === 1;
  say(byId("ask-limit-title"), `Limit of ${found.length === 1 ? found[0][1].name : "a tenant"}`);
  const shown = () => {
    const [device, tenant, place] = found[Number(chosen.value)];
    say(byId("ask-limit-text"), `${tenant.name} holds ${size(tenant.held)} of ${size(device.capacity)} on ${place}${tenant.floor ? `; ${size(tenant.floor)} are promised to it` : ""}.`);
    byId("limit-text").value = tenant.limit_wanted === null ? "none" : size(tenant.limit_wanted).replace(" ", "");
  };
  chosen.onchange = shown;
  shown();
  byId("limit-now").checked = false;
  say(byId("limit-error"), "");
  const sent = dialog.querySelector("form");
  sent.onsubmit = (event) => {
    event.preventDefault();
    const [, tenant, device] = found[Number(chosen.value)];
    orderLimit(dialog, device, tenant.name);
  };
  await open(dialog);
}

// Closes the dialog once the gateway has taken the order; what is wrong with it stands in the dialog.
async function orderLimit(dialog, device, tenant) {
  const body = { device, tenant, limit: byId("limit-text").value.trim(), now: byId("limit-now").checked };
  try {
    const order = await ask("/admin/limit", { method: "POST", body: JSON.stringify(body) });
    dialog.close("ok");
    const limit = order.wanted.bytes === null ? "no limit" : `a limit of ${size(order.wanted.bytes)}`;
    const how = { acknowledged: "", pending: " It has not acknowledged yet; nothing new goes above it.", kept: " It is kept for its next start." };
    tell(`${tenant} has ${limit}.${how[order.state]}`);
    poll();
  } catch (error) {
    say(byId("limit-error"), error.message);
    byId("limit-text").focus();
  }
}

// ---- settings of the page ----

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

const theme = byId("theme");
theme.value = localStorage.getItem("elastickv-theme") || "auto";
setTheme(theme.value);
theme.addEventListener("change", () => { localStorage.setItem("elastickv-theme", theme.value); setTheme(theme.value); });
byId("range").addEventListener("change", () => { if (seen.latest) render(); });
byId("key").addEventListener("click", askKey);
for (const button of document.querySelectorAll("dialog .cancel")) button.addEventListener("click", () => button.closest("dialog").close("cancel"));
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
setInterval(showLink, 1000);
poll();
