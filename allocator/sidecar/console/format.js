// Numbers and texts as people read them.

export function gib(bytes, digits = 2) {
  return bytes >= 0.1 * 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(digits)} GiB` : `${(bytes / 2 ** 20).toFixed(digits)} MiB`;
}

export function count(value) {
  return value.toLocaleString("en-US");
}

export function loss(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1000 || size < 0.001 ? value.toExponential(2) : value.toPrecision(3);
}

// Nothing is served at such a loss: its size says no more than that.
export const UNUSABLE_NATS = 3;

export const unusable = (value, unit) => unit.startsWith("nats") && value > UNUSABLE_NATS;

// A predicted loss as people read it; `unit` is that of the scores.
export function lossIn(value, unit) {
  return unusable(value, unit) ? "unusable" : loss(value);
}

export function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

// `model.layers.3.self_attn.q_proj` -> {block: 3, kind: "q", local: "self_attn.q_proj"}; experts share a kind.
export function place(name) {
  const match = /^(.*?)\.(\d+)\.(.+)$/.exec(name);
  if (!match) return { block: null, kind: name.replace(/^model\./, ""), local: name };
  const local = match[3];
  const kind = local.replace(/experts\.\d+\./, "experts.").split(".").pop().replace(/_proj$/, "");
  return { block: Number(match[2]), kind: local.includes("experts.") ? `experts ${kind}` : kind, local };
}

const quoted = (text) => (/^[A-Za-z0-9._:\/-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

export function serveCommand(state) {
  const lines = [`vllm serve ${quoted(state.checkpoint || `./${state.model}-gamma`)}`, `--served-model-name ${quoted(state.model)}`];
  if (state.count > 1) lines.push(`--tensor-parallel-size ${state.count}`);
  lines.push(`--max-model-len ${state.length}`, `--max-num-seqs ${state.sequences}`);
  if (state.batched) lines.push(`--max-num-batched-tokens ${state.batched}`);
  if (state.kv !== "auto") lines.push(`--kv-cache-dtype ${state.kv}`);
  lines.push(`--gpu-memory-utilization ${state.utilization}`);
  const command = lines.join(" \\\n  ");
  if (state.checkpoint) return command;
  const fusion = state.fusion === "free" ? "" : ` --fusion ${state.fusion}`; // free is what solve does with a budget
  return [
    command, "", `# ./${state.model}-gamma: the button below makes it, or`,
    `# gamma solve WORK/scores.json --budget ${state.bytes}${fusion} --out manifest.json`,
    `# gamma export MODEL --manifest manifest.json --bank WORK/bank --out ./${state.model}-gamma`,
  ].join("\n");
}

export function prepareCommand(state) {
  const device = state.gpu ? `--gpu ${quoted(state.gpu)}` : `--gpu-memory ${quoted(state.memory)}`;
  const lines = [`gamma prepare ${quoted(state.model)} --store ${quoted(state.store || "STORE")} --out ./served`, device];
  if (state.count > 1) lines.push(`--tensor-parallel-size ${state.count}`);
  lines.push(`--max-model-len ${state.length} --max-num-seqs ${state.sequences}`);
  if (state.kv !== "auto") lines.push(`--kv-cache-dtype ${state.kv}`);
  lines.push(`--fusion ${state.fusion}`, `--gpu-memory-utilization ${state.utilization}`, `--budget ${state.automatic ? "auto" : state.budget}`);
  return `${lines.join(" \\\n  ")}\nvllm serve --config ./served/vllm.yaml`;
}

// The GPU profiles that the chart has (helm/gamma/values.yaml); a cloud's file may say what they are called there.
export const CHART_PROFILES = ["rtx4090", "rtx5090", "l4", "l40s", "a10g", "a100-40gb", "a100-80gb", "h100", "h200"];

const slug = (text) => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "");

// As the chart takes it: with a unit, without spaces.
const memoryOf = (text) => text.replace(/[\s_]+/g, "").replace(/^([0-9.]+)$/, "$1B").replace(/kB$/, "KB");

// `state.productLabel`: what the GPU's nodes carry as nvidia.com/gpu.product; `state.deviceBytes`: its memory.
export function helmValues(state) {
  const profile = state.gpu ? (CHART_PROFILES.includes(state.gpu) ? state.gpu : slug(state.gpu)) : `memory-${slug(state.memory)}`;
  const lines = [
    "allocations:", `  - name: ${slug(slug(state.model).slice(0, 32))}`, `    model: ${JSON.stringify(state.model)}`, `    gpu: ${profile}`, `    count: ${state.count}`,
    `    maxModelLen: ${state.length}`, `    maxNumSeqs: ${state.sequences}`, `    kvCacheDtype: ${state.kv}`,
    `    gpuMemoryUtilization: ${state.utilization}`, `    fusion: ${state.fusion}`, `    budget: ${state.automatic ? "auto" : JSON.stringify(String(state.budget))}`,
  ];
  if (state.gpu && CHART_PROFILES.includes(state.gpu)) return lines.join("\n");
  lines.push("# A profile that the chart does not have: what these nodes are called may differ in your cluster.", "gpuProfiles:", `  ${profile}:`);
  if (state.gpu) lines.push(`    catalogue: ${JSON.stringify(state.gpu)}`, "    resource: nvidia.com/gpu", `    nodeSelector: {nvidia.com/gpu.product: ${JSON.stringify(state.productLabel)}}`);
  else lines.push(`    gpuMemory: ${JSON.stringify(memoryOf(state.memory))}`, "    resource: nvidia.com/gpu", `    minMemoryMiB: ${Math.floor((0.95 * state.deviceBytes) / 2 ** 20)}`);
  return lines.join("\n");
}
