// The page of meters: asks the server how it is, a few times a second, and draws it. No dependencies.
// Figures that are rates are differences of counters, so that every reader sees the same.

const INTERVAL_MS = 250;
const WINDOW_S = 2;
const HISTORY_S = 60;
const STATES = [
  ["s", "resident"], ["u", "in use"], ["r", "ready"], ["f", "streaming in"], ["v", "asked back"],
  ["!", "waited for"], [".", "not in a slot"],
];
const CLASS = { "!": "w", ".": "" };
const MEMORY = [
  ["arena_bytes", "slots"], ["copies_bytes", "packed copies"], ["staging_bytes", "staging"],
  ["planned_resident_bytes", "embedding, norms, biases"], ["planned_kv_cache_bytes", "KV cache"],
  ["planned_activation_bytes", "activations"], ["planned_scratch_bytes", "scratch"],
  ["planned_context_bytes", "contexts"], ["planned_slack_bytes", "slack"],
  ["planned_draft_bytes", "draft model"],
];

const at = (id) => document.getElementById(id);
const say = (id, text) => { const it = at(id); if (it.textContent !== text) it.textContent = text; };
const percent = (share) => `${Math.round(100 * share)} %`;

function bytes(size) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (size < 1000) return `${unit === "B" ? size : Number(size.toPrecision(3))} ${unit}`;
    size /= 1000;
  }
  return `${Number(size.toPrecision(3))} TB`;
}

let key = sessionStorage.getItem("key");
let model = null;
let cells = [];
let shown = "";
let samples = [];
let history = [];

async function ask(path, body) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const reply = await fetch(path, {
    method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), cache: "no-store",
  });
  const said = await reply.json();
  if (reply.status === 401) {
    at("key-form").hidden = false;
    at("meters").hidden = true;
  }
  if (!reply.ok) throw new Error(said.error.message);
  return said;
}

function drawModel() {
  say("model", model.model);
  document.title = `${model.model} – weight-feeder`;
  cells = [];
  const map = at("map");
  map.replaceChildren(...model.rows.map((row) => {
    const line = document.createElement("div");
    const label = document.createElement("span");
    const weights = document.createElement("div");
    line.className = "row";
    label.textContent = row.label;
    label.title = row.label;
    for (const index of row.weights) {
      const cell = document.createElement("i");
      if (index === null) cell.className = "none";
      else {
        cell.title = model.names[index];
        cells[index] = cell;
      }
      weights.append(cell);
    }
    line.append(label, weights);
    return line;
  }));
  at("legend").replaceChildren(...STATES.map(([state, name]) => {
    const item = document.createElement("li");
    const sign = document.createElement("i");
    const count = document.createElement("span");
    sign.className = CLASS[state] ?? state;
    count.id = `count-${name.replaceAll(" ", "-")}`;
    item.append(sign, `${name} `, count);
    return item;
  }));
}

function drawMap(states) {
  if (states === shown || states.length !== model.names.length) return;
  for (let index = 0; index < states.length; index++) {
    if (states[index] !== shown[index] && cells[index]) cells[index].className = CLASS[states[index]] ?? states[index];
  }
  shown = states;
  const counts = STATES.map(([state, name]) => {
    const count = states.split(state).length - 1;
    say(`count-${name.replaceAll(" ", "-")}`, String(count));
    return `${count} ${name}`;
  });
  at("map").setAttribute("aria-label", `the model's weights: ${counts.join(", ")}`);
}

function drawRates(now) {
  if (samples.length && now.tokens < samples[0].tokens) samples = [];
  samples.push(now);
  while (samples.length > 2 && samples[1].at_s <= now.at_s - WINDOW_S) samples.shift();
  const first = samples[0];
  const seconds = now.at_s - first.at_s;
  const rate = seconds > 0 ? (now.tokens - first.tokens) / seconds : 0;
  const stall = seconds > 0 ? Math.min(1, (now.stall_s - first.stall_s) / seconds) : 0;
  say("rate", rate.toFixed(rate < 100 ? 1 : 0));
  say("tokens", `${now.tokens.toLocaleString("en")} tokens so far`);
  say("stall", percent(stall));
  at("stall-bar").value = stall;
  history.push([now.at_s, rate]);
  while (history[0][0] < now.at_s - HISTORY_S) history.shift();
  const top = Math.max(1e-9, ...history.map(([, value]) => value));
  at("history").firstElementChild.setAttribute("points", history.map(([when, value]) =>
    `${(120 * (1 + (when - now.at_s) / HISTORY_S)).toFixed(1)},${(23 - 22 * value / top).toFixed(1)}`).join(" "));
}

function drawFeeder(feeder) {
  const link = feeder.link_bytes_per_s;
  const limit = feeder.link_limit_bytes_per_s;
  say("link", `${bytes(Math.round(link))}/s`);
  at("link-bar").value = limit ? Math.min(1, link / limit) : 0;
  say("link-limit", limit ? `${percent(Math.min(1, link / limit))} of the ${bytes(limit)}/s that were measured`
    : "its limit was not measured");
  say("slots", `${feeder.standing} of ${feeder.weights} stay, hit rate ${percent(feeder.hit_rate)}; ${bytes(feeder.streamed_bytes)} streamed in ${feeder.fills.toLocaleString("en")} fills`);
  drawMap(feeder.weight_states);
  const parts = MEMORY.map(([name, label]) => [label, feeder[name] ?? 0]).filter(([, size]) => size > 0);
  const most = Math.max(1, ...parts.map(([, size]) => size));
  const body = at("memory").tBodies[0];
  const text = parts.map(([label, size]) => `${label}${size}`).join();
  if (body.dataset.text !== text) {
    body.dataset.text = text;
    body.replaceChildren(...parts.map(([label, size]) => {
      const line = document.createElement("tr");
      const name = document.createElement("th");
      const number = document.createElement("td");
      const share = document.createElement("td");
      const bar = document.createElement("i");
      name.scope = "row";
      name.textContent = label;
      number.className = "number";
      number.textContent = bytes(size);
      share.className = "share";
      bar.style.width = `${100 * size / most}%`;
      share.append(bar);
      line.append(name, number, share);
      return line;
    }));
  }
  say("strategy-now", `now ${feeder.strategy}, cache ${feeder.cache}: ${feeder.room}, ${feeder.packed_slots} of the model's ${feeder.weights} packed; on ${feeder.device}`);
  const select = at("strategy");
  const names = feeder.strategies.split(",");
  if (select.options.length !== names.length) {
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.value = names.includes(feeder.strategy) ? feeder.strategy : names[0];
  }
}

function draw(now) {
  drawRates(now);
  say("requests", `${now.running} + ${now.waiting}`);
  say("replies", `being answered + waiting; ${now.answered} begun, ${now.refused} refused`);
  const there = now.feeder !== null;
  at("meters").classList.toggle("stale", !there);
  if (there) {
    drawFeeder(now.feeder);
    say("peaks", `host store ${bytes(now.feeder.packed_bytes)}; at the most so far: feeder ${bytes(now.feeder.peak_bytes)}${now.engine_peak_bytes ? `, engine ${bytes(now.engine_peak_bytes)}` : ""}. What is beside slots and staging is as planned.`);
  }
  connection(there ? "live" : "waiting for a feeder", !there);
}

function connection(text, bad) {
  say("connection", text);
  at("connection").classList.toggle("bad", bad);
}

async function turn() {
  if (document.hidden) return;
  try {
    model ??= await ask("/meters/model").then((said) => { model = said; drawModel(); return said; });
    draw(await ask("/meters/now"));
    at("key-form").hidden = true;
    at("meters").hidden = false;
  } catch (error) {
    samples = [];
    model = null; // the next server may have another
    shown = "";
    connection(error instanceof TypeError ? "the server does not answer" : error.message, true);
  }
}

async function live() {
  await turn();
  setTimeout(live, at("key-form").hidden ? INTERVAL_MS : 4 * INTERVAL_MS);
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  sessionStorage.setItem("key", key);
  turn();
});

at("swap").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.submitter ?? at("swap").querySelector("button");
  button.disabled = true;
  at("swapped").classList.remove("bad");
  say("swapped", "swapping …");
  try {
    const wish = { strategy: at("strategy").value, cache: at("cache").value.trim(), slots: at("kind").value };
    say("swapped", (await ask("/meters/swap", wish)).text);
  } catch (error) {
    at("swapped").classList.add("bad");
    say("swapped", error.message);
  } finally {
    button.disabled = false;
  }
});

live();
