// Each panel of the page from plain data. Nothing here asks the service.

import { curve, heatMap, memoryBar, swatch } from "./charts.js";
import { count, gib, loss, lossIn, percent, place, unusable } from "./format.js";

export const $ = (id) => document.getElementById(id);

const WIDTHS = [2, 3, 4, 5, 6, 8, 16];
const RUNTIME = ["cuda graphs", "non-torch", "attention workspace", "position tables"];

export function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// The answer has one of four forms: nothing beside the verdict, waiting for the first one, an answer, or an empty store.
const answer = () => document.querySelector(".answer");

export function nothing() {
  answer().classList.add("blank");
}

export function answered() {
  answer().classList.remove("blank");
}

export function waiting(text) {
  nothing();
  verdict("waiting", text, "");
  advice([]);
}

export function empty(is) {
  $("empty").hidden = !is;
  $("controls").hidden = is;
}

// The first field of the form whose value cannot be used.
export function wrongField() {
  const fields = [...$("controls").elements].filter((field) => field.willValidate && !field.closest("[hidden]"));
  for (const field of $("controls").elements) field.removeAttribute("aria-invalid");
  fields.filter((field) => !field.checkValidity()).forEach(markWrong);
  return fields.find((field) => !field.checkValidity());
}

export function markWrong(field) {
  field.setAttribute("aria-invalid", "true");
}

export const labelOf = (field) => field.labels[0].textContent;

export function verdict(kind, strong, rest, small) {
  const holder = $("verdict");
  holder.className = `verdict ${kind}`;
  holder.replaceChildren(element("b", strong), ` ${rest}`);
  if (small) holder.append(element("small", small));
}

export function advice(items, onTake) {
  const holder = $("advice");
  holder.hidden = items.length === 0;
  holder.replaceChildren(
    ...items.map((item) => {
      const button = element("button", `${item.option} ${item.value}`);
      button.type = "button";
      button.title = item.message;
      button.addEventListener("click", () => onTake(item));
      return button;
    }),
  );
}

// Commands for what does not fit would fail on the machine that they are pasted to.
export function usable(fits) {
  document.querySelector(".tabs").hidden = $("pane").hidden = !fits;
  $("use-not").hidden = fits;
  $("make").disabled = !fits;
}

export function figures(allocation, sweep) {
  const set = (id, text, small) => {
    $(id).replaceChildren(text);
    if (small) $(id).append(element("small", small));
  };
  set("f-size", gib(allocation.tensor_bytes), `${count(allocation.tensor_bytes)} bytes`);
  set("f-bits", `${allocation.average_bits.toFixed(2)} bits`, "scales and zeros included");
  const gap = allocation.proof && allocation.proof.gap > 0 ? `at most ${loss(allocation.proof.gap)} above the best` : "proven best";
  const broken = unusable(allocation.predicted_loss, allocation.unit);
  set("f-loss", lossIn(allocation.predicted_loss, allocation.unit), broken ? "too few bits for this model" : gap);
  const same = sweep ? oneWidth(sweep.uniform, allocation.tensor_bytes) : null;
  if (!broken && same > 0 && allocation.predicted_loss > 0) {
    const saved = 1 - allocation.predicted_loss / same;
    set("f-gain", saved >= 0 ? `−${percent(saved)}` : `+${percent(-saved)}`, "loss, at the same size");
  } else set("f-gain", "–");
}

// The allocations with one width a fused layer and with a width of its own for each module, by their fusion; null: not known.
export function fusionPrice(byFusion) {
  const { tied, free } = byFusion || {};
  const told = tied && free && free.predicted_loss > 0 && !unusable(tied.predicted_loss, tied.unit);
  const part = told ? Math.max(tied.predicted_loss / free.predicted_loss - 1, 0) : 0;
  $("fusion-hint").textContent = told ? `One width costs ${percent(part)} of predicted loss here; own widths decode more slowly.` : "";
}

// What one width for all would lose at this size: between two widths on the logarithm.
function oneWidth(uniform, bytes) {
  const points = Object.values(uniform).sort((p, q) => p.tensor_bytes - q.tensor_bytes).filter((p) => p.predicted_loss > 0);
  for (let i = 1; i < points.length; i++) {
    const [p, q] = [points[i - 1], points[i]];
    if (bytes >= p.tensor_bytes && bytes <= q.tensor_bytes) {
      const t = (bytes - p.tensor_bytes) / (q.tensor_bytes - p.tensor_bytes);
      return Math.exp((1 - t) * Math.log(p.predicted_loss) + t * Math.log(q.predicted_loss));
    }
  }
  return null;
}

export function memory(plan) {
  const line = (name) => plan.lines.find((l) => l.name === name)?.nbytes ?? 0;
  const total = line("device memory") || plan.device.total_bytes;
  const usable = line("vLLM may use");
  const states = line("recurrent state");
  const missing = plan.verdict.fits ? 0 : plan.verdict.needs_bytes;
  const weights = plan.planned ? plan.planned.weight_bytes : missing > 0 ? plan.weight_budget_bytes + missing : plan.smallest_weight_bytes;
  const known = ["device memory", "CUDA memory", "vLLM may use", "KV cache", "recurrent state", "activations", "slack", "left for weights", ...RUNTIME];
  const others = plan.lines.filter((l) => !known.includes(l.name)).reduce((sum, l) => sum + Math.max(l.nbytes, 0), 0);
  const parts = [
    { kind: "m-weights", label: "weights", bytes: weights },
    { kind: "m-kv", label: "KV cache", bytes: plan.planned && plan.verdict.fits ? plan.planned.kv_bytes - states : line("KV cache") },
    { kind: "m-state", label: "recurrent state", bytes: states },
    { kind: "m-act", label: "activations", bytes: line("activations") },
    { kind: "m-run", label: "graphs and runtime", bytes: RUNTIME.reduce((sum, name) => sum + line(name), 0) + others },
    { kind: "m-slack", label: "slack", bytes: line("slack") },
  ];
  const used = parts.reduce((sum, part) => sum + part.bytes, 0);
  // What is missing is missing from what vLLM may use, which is less than the card has.
  if (!missing) parts.push({ kind: "m-free", label: "left to others", bytes: Math.max(total - Math.max(used, usable), 0) });
  $("memory-bar").replaceChildren(memoryBar(parts, total, missing ? used - missing : total));
  if (missing > 0) parts.push({ kind: "m-over", label: "too much", bytes: missing });
  $("memory-legend").replaceChildren(
    ...parts.filter((part) => part.bytes > 0).map((part) => {
      const item = element("li");
      item.append(swatch(part.kind), `${part.label} `, element("b", gib(part.bytes)));
      return item;
    }),
  );
  $("memory-title").textContent = `Memory of one GPU: ${plan.device.name}, ${gib(total, 1)}`;
}

const MEASURED = "KL divergence from the original in nats a token, on the text named";

export function noCurve(why = "Solving for the sizes between the smallest and the largest …") {
  $("curve-note").hidden = true;
  $("curve").replaceChildren(element("p", why, "hint"));
}

export function pareto(sweep, gpus, allocation, onPick) {
  $("curve-note").hidden = false;
  $("curve-unit").textContent = sweep.unit.length > 60 ? sweep.unit.split(",")[0] : sweep.unit;
  curve($("curve"), {
    points: sweep.points,
    uniform: sweep.uniform,
    // Scores in another unit do not share an axis with what is measured.
    measured: sweep.unit.startsWith("nats") ? sweep.measured.map((m) => ({ bytes: m.tensor_bytes, loss: m.measured_loss, text: measuredText(m) })) : [],
    gpus,
    unit: sweep.unit,
    chosen: { bytes: allocation.tensor_bytes, loss: allocation.predicted_loss },
    onPick,
  });
  measuredTable(sweep.measured);
}

const textOf = (m) => `${count(m.tokens)} tokens of ${m.text_digest.slice(7, 15)}${m.record === "refinement" ? ", chosen on it" : ""}`;
const measuredText = (m) => `measured ${loss(m.measured_loss)} at ${gib(m.tensor_bytes)} on ${textOf(m)}; predicted ${loss(m.predicted_loss)}`;

// What stored manifests say was measured, the smallest first.
function measuredTable(found) {
  $("measured-part").hidden = found.length === 0;
  $("measured-note").replaceChildren(element("span", "◆", "down"), ` Measured: ${MEASURED}. Predicted: in the unit of the curve.`);
  const rows = found.map((m) => {
    const uniform = m.uniform_loss === undefined ? "–" : `${loss(m.uniform_loss)} at ${m.uniform_bits} bits`;
    return [gib(m.tensor_bytes), m.average_bits.toFixed(2), loss(m.predicted_loss), loss(m.measured_loss), uniform, textOf(m)];
  });
  $("measured").replaceChildren(table(["size", "bits", "predicted", "measured", "one width", "text"], rows.map((cells) => cells.map((cell) => [cell]))));
}

// heads: texts; rows: [[text, class?], ...], the first cell being the row's own head.
function table(heads, rows) {
  const made = element("table"), top = element("tr"), thead = element("thead"), body = element("tbody");
  const head = (text, scope) => Object.assign(element("th", text), { scope });
  top.append(...heads.map((text) => head(text, "col")));
  for (const [[name], ...cells] of rows) {
    const line = element("tr");
    line.append(head(name, "row"), ...cells.map(([text, kind]) => element("td", text, kind)));
    body.append(line);
  }
  thead.append(top);
  made.append(thead, body);
  return made;
}

let map = null;

export function widths(manifest, changed) {
  const cells = [], outside = [], shares = new Map();
  let all = 0;
  for (const [name, form] of Object.entries(manifest.modules)) {
    const at = place(name), weights = form.shape[0] * form.shape[1];
    shares.set(form.num_bits, (shares.get(form.num_bits) || 0) + weights);
    all += weights;
    const cell = { ...at, name, bits: form.num_bits, bytes: manifest.module_bytes[name], changed: changed.has(name) };
    if (at.block === null) outside.push(cell);
    else cells.push(cell);
  }
  map = cells.length ? heatMap($("map"), cells) : null;
  $("map-count").textContent = `${Object.keys(manifest.modules).length} modules`;
  $("map-legend").replaceChildren(
    ...WIDTHS.filter((bits) => shares.has(bits)).map((bits) => {
      const item = element("li");
      item.append(swatch(`w${bits}`), `${bits} bits `, element("b", percent(shares.get(bits) / all)));
      return item;
    }),
  );
  // Embedding and lm_head have no block: they stand below the map, with what a cell shows.
  $("map-outside").replaceChildren(
    ...outside.map((cell) => {
      const item = element("li");
      item.append(swatch(`w${cell.bits}`), `${cell.kind} `, element("b", `${cell.bits} bits, ${gib(cell.bytes)}`));
      if (cell.changed) item.append(element("span", "changed", "pill"));
      return item;
    }),
  );
}

function read(cells) {
  if (!cells || !cells.length) return;
  const [first] = cells;
  const bits = cells.length === 1 ? `${first.bits} bits` : `${Math.min(...cells.map((c) => c.bits))} to ${Math.max(...cells.map((c) => c.bits))} bits, ${cells.length} experts`;
  const bytes = cells.reduce((sum, c) => sum + c.bytes, 0);
  $("map-readout").textContent = `Block ${first.block}, ${first.local}: ${bits}, ${gib(bytes)}`;
}

export function listenToMap() {
  const holder = $("map");
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  holder.addEventListener("pointermove", (event) => map && read(map.at(event)));
  holder.addEventListener("pointerleave", () => map && map.hide());
  holder.addEventListener("blur", () => map && map.hide());
  holder.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step || !map) return;
    event.preventDefault();
    read(map.move(...step));
  });
}

export function difference(document_, unit) {
  const holder = $("diff");
  if (!document_) {
    holder.replaceChildren();
    return;
  }
  const kinds = new Map();
  for (const change of document_.changed) {
    const { kind } = place(change.module);
    const row = kinds.get(kind) || { more: 0, less: 0, bytes: 0 };
    if (change.bits_after > change.bits_before) row.more++;
    else if (change.bits_after < change.bits_before) row.less++;
    row.bytes += change.bytes_change;
    kinds.set(kind, row);
  }
  const signed = (bytes) => `${bytes < 0 ? "−" : "+"}${gib(Math.abs(bytes))}`;
  const before = document_.before.predicted_loss, after = document_.after.predicted_loss;
  const losses = before > 0 && after > 0 ? `, predicted loss ${lossIn(before, unit)} → ${lossIn(after, unit)}` : "";
  const head = element("p", `${document_.changed.length} of ${document_.modules} modules differ, ${signed(document_.tensor_bytes_change)}${losses}.`);
  holder.replaceChildren(head);
  if (!kinds.size) return;
  const rows = [...kinds].map(([kind, row]) => [[kind], [row.more || "–", row.more ? "up" : ""], [row.less || "–", row.less ? "down" : ""], [signed(row.bytes)]]);
  holder.append(table(["module", "wider", "narrower", "size"], rows));
}

export function gpuOptions(gpus, chosen) {
  const select = $("gpu"), groups = new Map();
  for (const gpu of gpus) {
    const group = groups.get(gpu.segment) || element("optgroup");
    group.label = gpu.segment;
    groups.set(gpu.segment, group);
    const option = element("option", `${gpu.name.replace(/^NVIDIA (GeForce )?/, "")} · ${(gpu.memory_bytes / 2 ** 30).toFixed(0)} GiB`);
    option.value = gpu.id;
    group.append(option);
  }
  const other = element("option", "another, by memory");
  other.value = "";
  select.replaceChildren(...groups.values(), other);
  if (gpus.some((gpu) => gpu.id === chosen)) select.value = chosen;
}
