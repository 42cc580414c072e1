"use strict";
const INTERVAL = 2000; // ms between two looks
const SHOWN = 150; // intervals of the density's history
const TALL = 210; // of its chart
const SVG = new Set(["svg", "rect", "line", "polyline", "text", "title"]);
const $ = (id) => document.getElementById(id);

let policy = null, plan = null, previous = null, running = null;
const densities = []; // of the latest intervals, null for those without decode rows

// Children that are strings become text, never markup.
function node(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// ---- numbers ----

const sum = (values) => Object.values(values ?? {}).reduce((all, value) => all + value, 0);
const known = (value, write) => (value === null || value === undefined ? "–" : write(value));
const percent = (value) => known(value, (v) => `${(100 * v).toFixed(1)}\u00a0%`);
const share = (value) => known(value, (v) => v.toFixed(3));
const count = (value) => known(value, (v) => v.toLocaleString("en", { notation: v < 1e6 ? "standard" : "compact" }));

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const unit = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(bytes, 1)) / 3));
  return `${(bytes / 1000 ** unit).toFixed(unit ? 2 : 0)} ${units[unit]}`;
}

// ---- the server ----

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function refusal(response) {
  if (response.status === 401) return "this server wants its API key";
  const body = await response.json().catch(() => ({}));
  return body.error?.message ?? `HTTP ${response.status}`;
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw new Error(await refusal(response));
  return response.json();
}

async function look() {
  if (policy === null || policy.backend === null) showPolicy((policy = await get("v1/sparsity")));
  if (plan === null) await lookAhead();
  const now = await get("v1/sparsity/live");
  if (previous && now.decode_rows < previous.decode_rows) policy = plan = previous = null; // another server by now
  showLive(now);
  previous = now;
}

async function lookAhead() {
  const length = $("length").value;
  plan = await get(length ? `v1/sparsity/plan?length=${encodeURIComponent(length)}` : "v1/sparsity/plan");
  showPlan();
}

function tell(message, bad) {
  $("status").textContent = message;
  $("status").classList.toggle("bad", bad);
}

async function poll() {
  try {
    if (!document.hidden) await look();
    const draining = previous?.draining ?? false;
    tell(draining ? "draining" : `live, ${new Date().toLocaleTimeString("en-GB")}`, draining);
  } catch (error) {
    tell(error instanceof TypeError ? "the server does not answer" : error.message, true);
  }
  setTimeout(poll, INTERVAL);
}

// ---- what is known before serving ----

function showPolicy() {
  const told = [policy.backend, policy.isa, policy.runner && `runner ${policy.runner}`, `version ${policy.version}`];
  $("title").textContent = `${policy.policy} on ${policy.model}`;
  $("runs-on").textContent = [...told, `self-check ${policy.self_check}`].filter(Boolean).join(" · ");
  $("runs-on").classList.toggle("bad", policy.self_check === "failed");
  $("policy-description").textContent = policy.description;
  $("parameters").replaceChildren(...Object.entries(policy.parameters).map(([name, value]) =>
    node("div", {}, node("dt", {}, name), node("dd", {}, typeof value === "string" ? value : JSON.stringify(value)))));
  const { dense, budget, aliases } = policy.requests;
  const options = () => [policy.model, ...aliases].map((name) =>
    node("option", { value: name }, name === policy.model ? "default" : name.slice(policy.model.length + 1)));
  for (const side of ["left", "right"]) $(`${side}-choice`).replaceChildren(...options());
  $("right-choice").selectedIndex = Math.min(1, aliases.length);
  $("refusals").textContent = [dense, budget].map((choice) => choice.why_not).filter(Boolean).join(" ");
}

function showPlan() {
  $("length").max = plan.max_length;
  $("length").placeholder = plan.max_length;
  const rows = plan.layers[0].kv_heads.length, columns = plan.layers.length;
  const left = 22, wide = Math.min(110, 640 / columns), high = Math.min(28, 136 / rows);
  const gap = Math.min(2, wide / 8, high / 8);
  const cells = plan.layers.flatMap((layer, column) => layer.kv_heads.map((head, row) => {
    const reads = `${head.reads}, ${Math.round(head.tokens)} tokens`;
    const told = node("title", {}, `layer ${layer.layer} (${layer.role}), KV head ${row}: ${reads}`);
    const box = { x: left + column * wide, y: row * high, width: wide - gap, height: high - gap };
    const shade = (0.25 + 0.75 * Math.sqrt(head.tokens / plan.length)).toFixed(3);
    return node("rect", { class: `cell ${head.reads}`, ...box, "fill-opacity": shade, rx: gap }, told);
  }));
  const every = Math.ceil(columns / 16), some = Math.ceil(rows / 8);
  const across = plan.layers.filter((_, i) => i % every === 0).map((layer) =>
    node("text", { x: left + layer.layer * wide, y: rows * high + 11 }, `${layer.layer}`));
  const down = plan.layers[0].kv_heads.map((_, row) => row).filter((row) => row % some === 0).map((row) =>
    node("text", { x: 0, y: row * high + high / 2 + 3 }, `${row}`));
  const view = `0 0 ${left + 640} ${rows * high + 14}`;
  $("heads").replaceChildren(node("svg", { viewBox: view, role: "img", "aria-label": "KV heads by layers" },
    ...cells, ...across, ...down));
  const kinds = { all: "everything", window: "its window", budget: "its budget" };
  const seen = new Set(plan.layers.flatMap((layer) => layer.kv_heads.map((head) => head.reads)));
  const keys = Object.keys(kinds).filter((kind) => seen.has(kind)).flatMap((kind) =>
    [node("span", { class: `key ${kind}` }), kinds[kind]]);
  $("plan-note").replaceChildren("layers across, KV heads down; the stronger the colour, the more tokens", ...keys,
    node("br"), `A row of ${count(plan.length)} tokens reads ${percent(plan.tokens_read)} of its tokens, ` +
    `${percent(plan.bytes_read)} of the bytes that dense attention reads, and stores ${percent(plan.bytes_stored)} ` +
    `of its bytes. Rows of up to ${count(plan.dense_up_to)} tokens read everything.`);
}

// ---- what happens ----

function showLive(now) {
  const role = (name) => (look) => sum(look?.tokens.map((one) => one[name]));
  const gained = (of) => (previous ? of(now) - of(previous) : 0);
  const resident = gained(role("resident"));
  const density = resident > 0 ? gained(role("attended")) / resident : null;
  const seconds = previous && now.time - previous.time;
  const rate = seconds > 0 ? gained((look) => look.decode_rows ?? 0) / seconds : null;
  densities.push(density);
  if (densities.length > SHOWN) densities.shift();
  showTiles(now, density, rate);
  showDensity(density);
  showRecall(now);
  showMemory(now);
  showCounters(now);
}

function mean(groups) {
  const seen = groups?.filter((group) => group.count) ?? [];
  const all = sum(seen.map((group) => group.count));
  return all ? sum(seen.map((group) => group.mean * group.count)) / all : null;
}

function held(bytes) {
  return bytes && bytes.full + bytes.window + bytes.summaries;
}

function showTiles(now, density, rate) {
  const requests = sum(now.requests?.map((one) => one.count));
  const failed = sum(now.requests?.filter((one) => one.outcome === "failed").map((one) => one.count));
  const bytes = now.kv_bytes, stored = bytes?.dense_equivalent ? held(bytes) / bytes.dense_equivalent : null;
  const since = `${percent(now.density)} since the start`, fits = known(now.capacity_gain, (v) => v.toFixed(2));
  const fallbacks = known(now.dense_fallbacks, (values) => count(sum(values)));
  const acting = now.dense_fallbacks || now.budget_widened !== null;
  const widened = acting ? `budgets widened: ${count(now.budget_widened)}` : "none without recall_action";
  const tiles = [
    ["Density", percent(density ?? now.density), density === null ? "since the start" : since],
    ["Decode rows per second", known(rate, (v) => v.toFixed(1)), `${count(now.decode_rows)} since the start`],
    ["Recall", share(mean(now.recall)), now.recall ? "softmax mass kept, mean" : "not measured"],
    ["KV bytes against dense", percent(stored), `${fits} times the rows fit`],
    ["Dense fallbacks", fallbacks, widened],
    ["Requests", now.requests ? count(requests) : "–", `failed: ${now.requests ? count(failed) : "–"}`],
  ];
  $("tiles").replaceChildren(...tiles.map(([name, value, note]) => node("div", { class: "card" },
    node("span", { class: "note" }, name), node("b", {}, value), node("span", { class: "note" }, note))));
}

function showDensity(density) {
  const top = Math.max(0.01, 1.1 * Math.max(...densities.map((value) => value ?? 0)));
  const at = (value, i) => `${(SHOWN - densities.length + i) * 4},${TALL - TALL * value / top}`;
  const runs = [[]]; // the line is broken where nothing was decoded
  densities.forEach((value, i) => (value === null ? runs.push([]) : runs.at(-1).push(at(value, i))));
  const lines = runs.filter((run) => run.length).map((run) => // a run of one is a dot
    node("polyline", { class: "spark", points: [...run, run.at(-1)].join(" ") }));
  const grid = [0, TALL / 2, TALL].map((y) => node("line", { class: "grid", x1: 0, x2: 600, y1: y, y2: y }));
  const scale = [[percent(top), 12], [percent(top / 2), TALL / 2 - 3], ["0", TALL - 3]];
  const labels = scale.map(([text, y]) => node("text", { x: 2, y }, text));
  const box = { viewBox: `0 -1 600 ${TALL + 2}`, role: "img", "aria-label": "density over time" };
  $("density").replaceChildren(node("svg", box, ...grid, ...lines, ...labels));
  $("density-now").textContent = density === null ? "nothing decoded just now" : percent(density);
}

function showRecall(now) {
  const floor = now.recall_floor;
  $("recall-floor").textContent = floor === null ? "no floor" : `floor ${share(floor)}`;
  if (!now.recall) {
    const why = policy?.recall.remedy ? `Not measured: ${policy.recall.remedy}.` : "Nothing measured yet.";
    return $("recall").replaceChildren(node("div", { class: "note" }, why));
  }
  const high = 24, top = 14, x = 70, wide = 144, right = x + wide;
  const rows = now.recall.flatMap((group, i) => {
    const y = top + i * high, value = group.mean ?? 0;
    const low = floor !== null && group.count && value < floor ? " low" : "";
    const error = now.output_error?.find((one) => one.layers === group.layers)?.mean;
    const most = Math.max(1, ...group.buckets.map((bucket) => bucket.count));
    const bar = 56 / Math.max(1, group.buckets.length);
    return [
      node("text", { x: 0, y: y + 12 }, `layers ${group.layers}`),
      node("rect", { class: "track", x, y: y + 2, width: wide, height: 13, rx: 2 }),
      node("rect", { class: `fill recall-bar${low}`, x, y: y + 2, width: wide * value, height: 13, rx: 2 }),
      node("text", { x: right + 6, y: y + 12 }, share(group.mean)),
      ...group.buckets.map((bucket, n) => node("rect", { class: "fill", x: right + 42 + n * bar,
        y: y + 16 - 14 * bucket.count / most, width: bar * 0.8, height: 14 * bucket.count / most },
        node("title", {}, `up to ${bucket.at_most ?? 1}: ${count(bucket.count)} rows`))),
      node("text", { x: right + 106, y: y + 12 }, share(error)),
    ];
  });
  const titles = [["softmax mass kept", x], ["mean", right + 6], ["histogram", right + 42], ["error", right + 106]];
  const heads = titles.map(([text, at]) => node("text", { x: at, y: 9 }, text));
  const tall = top + now.recall.length * high, at = x + wide * (floor ?? 0);
  const line = floor === null ? [] : [node("line", { class: "floor", x1: at, x2: at, y1: top, y2: tall - 6 })];
  const box = { viewBox: `0 0 352 ${tall}`, role: "img", "aria-label": "recall by layers" };
  $("recall").replaceChildren(node("svg", box, ...heads, ...rows, ...line));
}

function showMemory(now) {
  const bytes = now.kv_bytes;
  if (!bytes) return $("memory").replaceChildren(node("div", { class: "note" }, "Nothing decoded yet."));
  const all = Math.max(bytes.dense_equivalent, held(bytes), 1);
  const kinds = { full: "fill", window: "window-bytes", summaries: "page-state-bytes" };
  let x = 0;
  const parts = Object.entries(kinds).map(([kind, look]) => {
    const part = node("rect", { class: look, x, y: 14, width: 352 * bytes[kind] / all, height: 18 });
    x += 352 * bytes[kind] / all;
    return part;
  });
  const dense = node("rect", { class: "track", x: 0, y: 54, width: 352 * bytes.dense_equivalent / all, height: 18 });
  const told = [`held: ${size(held(bytes))}`, `dense attention would hold: ${size(bytes.dense_equivalent)}`];
  const labels = told.map((text, i) => node("text", { x: 0, y: 10 + 40 * i }, text));
  const keys = Object.keys(kinds).flatMap((kind) =>
    [node("span", { class: `key ${kind}` }), `${kind} ${size(bytes[kind])}`]);
  const box = { viewBox: "0 0 352 74", role: "img", "aria-label": "bytes of the KV cache" };
  $("memory").replaceChildren(node("svg", box, ...parts, dense, ...labels), node("div", { class: "note" }, ...keys));
}

function showCounters(now) {
  const each = (name, values) =>
    Object.entries(values ?? { "": null }).map(([label, value]) => [`${name} ${label}`, value]);
  const requests = (now.requests ?? []).filter((one) => one.count);
  const rows = [
    ...each("requests under the floor,", now.under_floor), ["budgets widened", now.budget_widened],
    ...each("dense fallbacks,", now.dense_fallbacks), ...each("dense rows,", now.dense_rows),
    ...requests.map((one) => [`requests ${one.choice}, ${one.outcome}`, one.count]),
  ];
  $("counters").replaceChildren(...rows.map(([name, value]) =>
    node("tr", {}, node("th", {}, name.replace(/, $/, "")), node("td", {}, count(value)))));
}

// ---- side by side ----

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    yield* lines.filter((line) => line.startsWith("data: {")).map((line) => JSON.parse(line.slice(6)));
  }
}

async function answer(side, signal) {
  const [told, shown] = [$(`${side}-told`), $(side)], asked = $(`${side}-choice`).value;
  const body = { model: asked, prompt: $("prompt").value, max_tokens: $("max-tokens").valueAsNumber, temperature: 0,
    stream: true, stream_options: { include_usage: true }, cache_salt: `${Date.now()}-${Math.random()}` };
  const start = performance.now();
  let first = null, last = null, tokens = 0;
  told.textContent = `${asked}: waiting`;
  const asking = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await fetch("v1/completions", asking);
  if (!response.ok) throw new Error(await refusal(response));
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    tokens = event.usage?.completion_tokens ?? tokens;
    if (!event.choices?.length) continue;
    last = performance.now();
    first ??= last;
    shown.append(event.choices[0].text);
  }
  const each = tokens > 1 ? `${((last - first) / (tokens - 1)).toFixed(1)} ms/token` : "– ms/token";
  const wait = known(first, (v) => (v - start).toFixed(0));
  told.textContent = `${asked}: first token ${wait} ms, ${each}, ${tokens} tokens`;
}

function mark(side, at) {
  const letters = [...$(side).textContent];
  const differs = node("mark", {}, letters[at] ?? "[end]");
  $(side).replaceChildren(letters.slice(0, at).join(""), differs,
    node("span", { class: "differs" }, letters.slice(at + 1).join("")));
  $(side).scrollTop = differs.offsetTop - $(side).offsetTop - 40;
}

function judge() {
  const [left, right] = ["left", "right"].map((side) => [...$(side).textContent]);
  const longest = Math.max(left.length, right.length);
  let at = 0;
  while (at < longest && left[at] === right[at]) at += 1;
  if (at < longest) ["left", "right"].forEach((side) => mark(side, at));
  $("verdict").textContent = at < longest ? `First difference after ${at} of ${longest} characters.` : "The same text.";
}

async function run(event) {
  event.preventDefault();
  running = new AbortController();
  const free = (done) => { $("run").disabled = !done; $("stop").disabled = done; };
  free(false);
  for (const id of ["left", "right", "left-told", "right-told", "verdict"]) $(id).textContent = "";
  let side = "left";
  try {
    await answer("left", running.signal);
    await answer((side = "right"), running.signal);
    judge();
  } catch (error) {
    $(`${side}-told`).textContent = running.signal.aborted ? "stopped" : error.message;
  }
  free(true);
}

$("form").addEventListener("submit", run);
$("stop").addEventListener("click", () => running.abort());
$("access").addEventListener("submit", (event) => event.preventDefault());
$("length").addEventListener("change", () => {
  if ($("length").reportValidity()) lookAhead().catch((error) => { $("plan-note").textContent = error.message; });
});
poll();
