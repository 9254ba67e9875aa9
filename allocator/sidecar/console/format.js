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
  return lines.join(" \\\n  ");
}

export function prepareCommand(state) {
  const device = state.gpu ? `--gpu ${quoted(state.gpu)}` : `--gpu-memory ${quoted(state.memory)}`;
  const lines = [`gamma prepare ${quoted(state.model)} --store ${quoted(state.store || "STORE")} --out ./served`, device];
  if (state.count > 1) lines.push(`--tensor-parallel-size ${state.count}`);
  lines.push(`--max-model-len ${state.length} --max-num-seqs ${state.sequences}`);
  if (state.kv !== "auto") lines.push(`--kv-cache-dtype ${state.kv}`);
  lines.push(`--gpu-memory-utilization ${state.utilization}`, `--budget ${state.automatic ? "auto" : state.budget}`);
  return `${lines.join(" \\\n  ")}\nvllm serve --config ./served/vllm.yaml`;
}

export function helmValues(state) {
  const name = state.model.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 40);
  const gpu = state.gpu || "any";
  const lines = [
    "allocations:", `  - name: ${name}`, `    model: ${JSON.stringify(state.model)}`, `    gpu: ${gpu}`, `    count: ${state.count}`,
    `    maxModelLen: ${state.length}`, `    maxNumSeqs: ${state.sequences}`, `    kvCacheDtype: ${state.kv}`,
    `    gpuMemoryUtilization: ${state.utilization}`, `    budget: ${state.automatic ? "auto" : JSON.stringify(String(state.budget))}`,
  ];
  return lines.join("\n");
}
