// The page: reads the controls, asks the service, and hands the answers to the panels.

import { ApiError, ask, askPatiently, setToken } from "./api.js";
import { gib, helmValues, lossIn, prepareCommand, serveCommand } from "./format.js";
import * as panels from "./panels.js";

const { $, element } = panels;
const STEPS = 1000, WAIT = 140;
// Which input a parameter of the API is.
const FIELDS = {
  model: "model", gpu: "gpu", gpu_memory: "memory", max_model_len: "length", max_num_seqs: "sequences", tensor_parallel_size: "count",
  gpu_memory_utilization: "utilization", budget: "budget",
};
const MARKED = ["rtx4060ti", "l4", "rtx4090", "rtx5090", "a100-40gb", "l40s", "h100", "h200", "b200"];

const state = {
  models: [], gpus: [], node: null, version: "", sweep: null, sweepKey: "", marks: [], plan: null, allocation: null, byFusion: null, manifest: null,
  manifestText: "", automatic: true, bytes: null, changed: new Set(), kept: new Map(), checkpoint: null, job: null, tab: "serve", url: null, run: 0,
};
let abort = new AbortController();
let timer = 0;

const model = () => state.models.find((m) => m.name === $("model").value);
const radio = (name) => document.querySelector(`input[name=${name}]:checked`).value;

function hardware() {
  const own = $("gpu").value === "";
  const body = {
    max_model_len: Number($("length").value), max_num_seqs: Number($("sequences").value), kv_cache_dtype: radio("kv"),
    tensor_parallel_size: Number($("count").value), gpu_memory_utilization: Number($("utilization").value),
  };
  return own ? { ...body, gpu_memory: $("memory").value.trim() } : { ...body, gpu: $("gpu").value };
}

// The slider covers what is feasible; its steps are even on the logarithm, so that small sizes get as many.
const range = () => {
  const [low, high] = model().feasible_bytes;
  return { low, high };
};
const ofStep = (step) => {
  const { low, high } = range();
  return Math.round(low * (high / low) ** (step / STEPS));
};
const toStep = (bytes) => {
  const { low, high } = range();
  return Math.round((STEPS * Math.log(Math.min(Math.max(bytes, low), high) / low)) / Math.log(high / low));
};

async function start() {
  panels.waiting("Reading what the store offers …");
  try {
    const [models, gpus, node, version] = await Promise.all([ask("GET", "v1/models"), ask("GET", "v1/gpus"), ask("GET", "v1/node"), ask("GET", "version")]);
    Object.assign(state, { models: latest(models.data), gpus: gpus.data, node, version: version.version });
  } catch (error) {
    return fail(error);
  }
  $("version").textContent = `version ${state.version}`;
  showNode();
  const given = new URLSearchParams(location.hash.slice(1));
  $("model").replaceChildren(...state.models.map((m) => element("option", m.name)));
  panels.gpuOptions(state.gpus, given.get("gpu") ?? "rtx4090");
  for (const id of ["model", "count", "length", "sequences", "utilization", "memory"]) if (given.get(id)) $(id).value = given.get(id);
  if (given.get("gpu") === "") $("gpu").value = "";
  for (const name of ["kv", "fusion"]) {
    const input = document.querySelector(`input[name=${name}][value="${CSS.escape(given.get(name) || "")}"]`);
    if (input) input.checked = true;
  }
  panels.empty(!state.models.length);
  if (!state.models.length) return panels.verdict("", "The store is empty.", "There is no model to choose from yet.");
  if (!model()) $("model").selectedIndex = 0;
  const bytes = Number(given.get("bytes")), { low, high } = range();
  if (bytes > 0) [state.automatic, state.bytes] = [false, Math.round(Math.min(Math.max(bytes, low), high))];
  await chooseModel();
}

// One entry a name: the newest, which comes first.
function latest(models) {
  const seen = new Set();
  return models.filter((m) => !seen.has(m.name) && seen.add(m.name));
}

function showNode() {
  const { node } = state, pill = $("node");
  pill.hidden = node.state === "off";
  pill.className = node.state === "failed" ? "pill bad" : "pill";
  pill.textContent = { preparing: "preparing this node", ready: "this node is ready", failed: "preparing failed" }[node.state] || "";
  pill.title = node.message || node.step || "";
  if (node.manifest_digest) state.kept.set(node.manifest_digest, "running on this node");
  showAgainst();
}

async function chooseModel() {
  const m = model();
  $("model-hint").textContent = `${m.modules} modules, ${gib(m.feasible_bytes[0])} to ${gib(m.feasible_bytes[1])}, scores: ${m.method}`;
  const longest = $("length");
  if (!longest.dataset.touched && m.feasible_bytes[1] < 2 ** 30) longest.value = Math.min(Number(longest.value), 256);
  await refresh();
}

// Everything anew; what was under way is dropped.
async function refresh() {
  abort.abort();
  abort = new AbortController();
  const { signal } = abort, run = ++state.run;
  $("memory-field").hidden = $("gpu").value !== "";
  const wrong = panels.wrongField();
  if (wrong) return fail(new ApiError(0, { error: { message: wrong.validationMessage, param: panels.labelOf(wrong) } }));
  document.querySelector(".answer").classList.add("busy");
  if (!state.allocation) panels.waiting("Working out what fits …");
  remember();
  try {
    await fit(signal, run);
    if (run !== state.run) return;
    show();
    document.querySelector(".answer").classList.remove("busy");
    try {
      await Promise.all([sweep(signal, run), marks(signal, run), price(signal, run)]);
      if (run === state.run) showCurve();
    } catch (error) {
      if (error.name === "AbortError" || error.status === 401) throw error;
      if (run === state.run) panels.noCurve(error.message); // the answer itself stands
    }
  } catch (error) {
    if (error.name !== "AbortError" && run === state.run) fail(error);
  } finally {
    if (run === state.run) document.querySelector(".answer").classList.remove("busy");
  }
}

function fitted(fusion, signal) {
  const body = { model: model().name, hardware: hardware(), fusion };
  if (!state.automatic) body.budget = String(state.bytes);
  return askPatiently("POST", "v1/fits", body, signal);
}

// Plan, assignment and manifest in one answer: the next request may reach another replica, which knows nothing of this one.
async function fit(signal, run) {
  const found = await fitted(radio("fusion"), signal);
  if (run !== state.run) return;
  const { manifest, ...allocation } = found.allocation;
  Object.assign(state, { plan: found.plan, filled: found.planned, allocation, manifest: JSON.parse(manifest), manifestText: manifest, checkpoint: null, byFusion: null });
  if (state.automatic) state.bytes = allocation.budget_bytes;
  await compare(signal);
}

// What one width a fused layer costs at this budget: the page asks what the other choice would lose.
async function price(signal, run) {
  const fusion = radio("fusion");
  const other = await fitted(fusion === "free" ? "tied" : "free", signal).catch((error) => (error.name === "AbortError" ? Promise.reject(error) : null));
  if (run !== state.run || !other) return;
  state.byFusion = { [fusion]: state.allocation, [other.allocation.request.fusion]: other.allocation };
  panels.fusionPrice(state.fits ? state.byFusion : null);
}

const sweepKey = () => `${model().scores_digest} ${radio("fusion")}`;

async function sweep(signal, run) {
  const key = sweepKey();
  if (state.sweepKey === key) return;
  const found = await askPatiently("POST", "v1/sweeps", { model: model().name, points: 21, fusion: radio("fusion") }, signal);
  if (run === state.run) [state.sweep, state.sweepKey] = [found, key];
}

// What other GPUs leave for the weights, for the same traffic.
async function marks(signal, run) {
  const body = hardware();
  delete body.gpu_memory;
  const names = MARKED.filter((id) => state.gpus.some((gpu) => gpu.id === id));
  if (body.gpu && !names.includes(body.gpu)) names.push(body.gpu);
  const found = await Promise.all(
    names.map((gpu) => askPatiently("POST", "v1/plans", { model: model().name, ...body, gpu }, signal).catch((error) => (error.name === "AbortError" ? Promise.reject(error) : null))),
  );
  if (run !== state.run) return;
  const label = (plan) => plan.device.name.replace(/^(NVIDIA|Tesla) (GeForce )?/, "").replace(/ (80GB HBM3|PCIe)$/, "").replace(/-SXM4-/, " ");
  state.marks = found.filter((plan) => plan && plan.weight_budget_bytes > 0).map((plan) => ({ name: label(plan), bytes: plan.weight_budget_bytes * plan.request.tensor_parallel_size }));
}

function show() {
  const { allocation, plan, filled } = state;
  const device = `${$("count").value > 1 ? `${$("count").value} × ` : ""}${plan.device.name.replace(/^NVIDIA /, "")}`;
  const told = state.automatic ? plan.verdict : filled.verdict;
  if (told.fits) {
    const room = filled.planned ? `Room for ${filled.planned.tokens.toLocaleString("en-US")} tokens: ${filled.planned.sequences} × ${filled.request.max_model_len.toLocaleString("en-US")} at once.` : "";
    panels.verdict("good", "Fits.", `${allocation.model} at ${allocation.average_bits.toFixed(2)} bits on ${device}.`, room);
  } else {
    panels.verdict("bad", "Does not fit.", `${allocation.model} on ${device} needs ${gib(told.needs_bytes)} more a GPU.`, told === plan.verdict ? (plan.advice.length ? "One of these would make it fit:" : "No single change makes it fit; take a larger GPU or more of them.") : "Choose less, or fill the GPU.");
  }
  panels.fusionPrice(told.fits ? state.byFusion : null);
  panels.advice(told.fits ? [] : (state.automatic ? plan : filled).advice, takeAdvice);
  panels.answered();
  showCurve();
  panels.memory(filled);
  panels.widths(state.manifest, state.changed);
  slider();
  commands();
  if (state.url) URL.revokeObjectURL(state.url);
  state.url = URL.createObjectURL(new Blob([state.manifestText], { type: "application/json" }));
  $("manifest").href = state.url;
  state.fits = told.fits;
  panels.usable(told.fits);
  $("job").textContent = "";
}

// The curve takes longer than the rest for a large model: it is drawn when it is there.
function showCurve() {
  const known = state.sweepKey === sweepKey() ? state.sweep : null;
  panels.figures(state.allocation, known);
  if (known) panels.pareto(known, state.marks, state.allocation, pick);
  else panels.noCurve();
}

function slider() {
  const input = $("budget");
  input.value = toStep(state.bytes);
  input.setAttribute("aria-valuetext", `${gib(state.bytes)}, ${state.allocation.average_bits.toFixed(2)} bits, predicted loss ${lossIn(state.allocation.predicted_loss, state.allocation.unit)}`);
  $("fit").disabled = state.automatic || !state.plan.verdict.fits;
  const { low, high } = range();
  $("marks").replaceChildren(
    ...[0, 0.25, 0.5, 0.75, 1].map((share) => {
      const mark = element("span", gib(low * (high / low) ** share, 1), share === 0 ? "first" : share === 1 ? "last" : "");
      mark.style.left = `${100 * share}%`;
      return mark;
    }),
  );
}

function pick(bytes) {
  const { low, high } = range();
  state.automatic = false;
  state.bytes = Math.round(Math.min(Math.max(bytes, low), high));
  $("budget").value = toStep(state.bytes);
  soon();
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(refresh, WAIT);
}

function takeAdvice({ option, value }) {
  const fields = { "--max-model-len": "length", "--max-num-seqs": "sequences", "--gpu-memory-utilization": "utilization", "--tensor-parallel-size": "count", "--gpu": "gpu" };
  if (option === "--kv-cache-dtype") document.querySelector(`input[name=kv][value=fp8]`).checked = true;
  else if (fields[option]) $(fields[option]).value = value;
  state.automatic = true;
  refresh();
}

function commands() {
  const allocated = state.allocation.request;
  const given = {
    model: model().name, gpu: $("gpu").value, memory: $("memory").value.trim(), count: Number($("count").value), length: state.plan.request.max_model_len,
    sequences: Number($("sequences").value), kv: radio("kv"), utilization: Number($("utilization").value), automatic: Boolean(allocated.plan),
    budget: allocated.budget || state.allocation.budget_bytes, batched: state.plan.batched_tokens, checkpoint: state.checkpoint,
    fusion: allocated.fusion, bytes: state.allocation.tensor_bytes, deviceBytes: state.plan.device.total_bytes,
    productLabel: state.plan.device.product_label,
  };
  $("code").textContent = { serve: serveCommand, helm: helmValues, prepare: prepareCommand }[state.tab](given);
}

function showAgainst() {
  const select = $("against"), before = select.value;
  const nothing = element("option", "nothing");
  nothing.value = "";
  const options = [...state.kept].map(([key, label]) => {
    const option = element("option", label);
    option.value = key;
    return option;
  });
  select.replaceChildren(nothing, ...options);
  select.value = state.kept.has(before) ? before : "";
}

// What a kept assignment is for `v1/diff`, as JSON: the request that it answers, or the text of a file.
const sides = new Map();

async function compare(signal) {
  const against = $("against").value;
  state.changed = new Set();
  if (!against || !state.allocation) return panels.difference(null);
  try {
    // Files go as their text: numbers written anew could have another digest.
    const before = sides.get(against) || JSON.stringify(against), after = JSON.stringify({ allocation: state.allocation.request });
    const document_ = await askPatiently("POST", "v1/diff", `{"before": ${before}, "after": ${after}}`, signal);
    state.changed = new Set(document_.changed.map((change) => change.module));
    panels.difference(document_, state.allocation.unit);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    $("diff").replaceChildren(element("p", error.message, "down"));
  }
}

async function recompare() {
  await compare();
  if (state.manifest) panels.widths(state.manifest, state.changed);
}

async function make() {
  $("make").disabled = true;
  const say = (text) => ($("job").textContent = text);
  try {
    say("asking …");
    const kept = await askPatiently("POST", "v1/allocations", state.allocation.request);
    let job = await ask("POST", "v1/checkpoints", { manifest: kept.manifest_digest });
    $("job-bar").hidden = $("cancel").hidden = false;
    state.job = job.id;
    while (job.state === "queued" || job.state === "running") {
      $("job-bar").value = job.progress;
      say(job.state === "queued" ? "waiting for its turn" : `${job.step || "starting"}, ${Math.round(100 * job.progress)} %`);
      await new Promise((resolve) => setTimeout(resolve, 700));
      job = await ask("GET", `v1/jobs/${job.id}`);
    }
    if (job.state === "cancelled") return say("Cancelled.");
    if (job.state === "failed") throw new ApiError(500, { error: { message: job.error } });
    say(`Done: ${job.checkpoint}`);
    state.checkpoint = job.checkpoint;
    commands();
  } catch (error) {
    say(error.message);
    if (error.status === 401) fail(error);
  } finally {
    $("job-bar").hidden = $("cancel").hidden = true;
    $("make").disabled = !state.fits;
  }
}

function remember() {
  const given = new URLSearchParams();
  for (const id of ["model", "gpu", "count", "length", "sequences", "utilization"]) given.set(id, $(id).value);
  if ($("gpu").value === "") given.set("memory", $("memory").value);
  for (const name of ["kv", "fusion"]) given.set(name, radio(name));
  if (!state.automatic && state.bytes) given.set("bytes", String(state.bytes));
  history.replaceState(null, "", `#${given}`);
}

function fail(error) {
  document.querySelector(".answer").classList.remove("busy");
  if (error.status === 401) {
    $("token-why").textContent = error.message;
    if (!$("token-dialog").open) $("token-dialog").showModal();
    panels.nothing();
    return panels.verdict("bad", "A token is needed.", error.message);
  }
  const name = (error.param || "").replace(/^hardware\./, ""), field = FIELDS[name] && $(FIELDS[name]);
  if (field) panels.markWrong(field);
  // What stood here answered another question: neither it nor its commands stay.
  state.allocation = state.manifest = null;
  if (field === $("budget")) state.automatic = true; // the slider is hidden now: the next answer is for what fits
  state.changed = new Set();
  panels.nothing();
  panels.verdict("bad", field ? `${panels.labelOf(field)}:` : name ? `${name}:` : "No answer.", error.message);
  panels.advice([], takeAdvice);
}

function listen() {
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("controls").addEventListener("change", (event) => {
    if (event.target.id === "length") event.target.dataset.touched = "1";
    if (!model()) return;
    if (event.target.id === "model") [state.automatic, state.bytes, state.allocation] = [true, null, null];
    (event.target.id === "model" ? chooseModel : refresh)();
  });
  $("budget").addEventListener("input", () => pick(ofStep(Number($("budget").value))));
  $("fit").addEventListener("click", () => {
    state.automatic = true;
    refresh();
  });
  $("pin").addEventListener("click", () => {
    if (!state.allocation) return;
    const { manifest_digest, model: name, tensor_bytes } = state.allocation;
    state.kept.set(manifest_digest, `${name}, ${gib(tensor_bytes)}`);
    sides.set(manifest_digest, JSON.stringify({ allocation: state.allocation.request }));
    showAgainst();
    $("against").value = manifest_digest;
    recompare();
  });
  $("against").addEventListener("change", recompare);
  $("against-file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    try {
      const text = await file.text();
      JSON.parse(text);
      sides.set(file.name, text);
      state.kept.set(file.name, file.name);
      showAgainst();
      $("against").value = file.name;
      recompare();
    } catch {
      $("diff").replaceChildren(element("p", `${file.name} is no manifest`, "down"));
    }
    event.target.value = "";
  });
  const tabs = ["serve", "helm", "prepare"];
  const openTab = (name) => {
    state.tab = name;
    for (const t of tabs) {
      $(`tab-${t}`).setAttribute("aria-selected", String(t === name));
      $(`tab-${t}`).tabIndex = t === name ? 0 : -1;
    }
    $("pane").setAttribute("aria-labelledby", `tab-${name}`);
    if (state.allocation) commands();
  };
  tabs.forEach((name, i) => {
    $(`tab-${name}`).addEventListener("click", () => openTab(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      openTab(next);
      $(`tab-${next}`).focus();
    });
  });
  $("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText($("code").textContent);
      $("copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren($("code"));
      $("copy").textContent = "Selected";
    }
    setTimeout(() => ($("copy").textContent = "Copy"), 1500);
  });
  $("make").addEventListener("click", make);
  $("cancel").addEventListener("click", () => ask("POST", `v1/jobs/${state.job}/cancel`).catch((error) => ($("job").textContent = error.message)));
  $("token-open").addEventListener("click", () => $("token-dialog").showModal());
  $("token-cancel").addEventListener("click", () => $("token-dialog").close());
  $("token-form").addEventListener("submit", () => {
    setToken($("token").value.trim());
    $("token").value = "";
    start();
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width && state.allocation) show();
    width = innerWidth;
  });
  panels.listenToMap();
}

listen();
start();
