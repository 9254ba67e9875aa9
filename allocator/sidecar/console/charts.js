// The drawings: plain SVG made with the DOM, so that the page needs no inline styles or scripts.

import { gib, loss } from "./format.js";

const SPACE = "http://www.w3.org/2000/svg";

export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function swatch(kind) {
  return draw("svg", { viewBox: "0 0 11 11", "aria-hidden": "true" }, draw("rect", { width: 11, height: 11, rx: 2.5, class: kind }));
}

// parts: [{kind, label, bytes}] from left to right; total: bytes of the device; limit: what of them may be used.
export function memoryBar(parts, total, limit) {
  const used = parts.reduce((sum, part) => sum + part.bytes, 0);
  const width = 1000, height = 34, whole = Math.max(total, used);
  const text = parts.map((part) => `${part.label} ${gib(part.bytes)}`).join(", ");
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, preserveAspectRatio: "none", role: "img", "aria-label": `${gib(total)}: ${text}` });
  let x = 0;
  for (const part of parts) {
    const share = (part.bytes / whole) * width;
    if (share > 0.3) svg.append(draw("rect", { x, y: 0, width: Math.max(share - 2, 0.6), height, class: part.kind, rx: 0 }));
    x += share;
  }
  if (used > limit) {
    const end = (limit / whole) * width;
    svg.append(draw("rect", { x: end, y: 0, width: ((used - limit) / whole) * width, height, class: "m-beyond" }), draw("rect", { x: end - 1.5, y: -5, width: 3, height: height + 10, class: "m-over" }));
  }
  return svg;
}

// The Pareto curve. `points`: [{budget_bytes, predicted_loss}], `uniform`: {width: point},
// `measured`: [{bytes, loss, text}], `gpus`: [{name, bytes}], `chosen`: {bytes, loss}. Calls onPick(bytes) for a click.
export function curve(holder, { points, uniform, measured, gpus, chosen, onPick }) {
  const width = Math.max(holder.clientWidth, 280), height = width < 520 ? 260 : 320;
  const left = 54, right = 14, top = 30, bottom = 34;
  const positive = points.filter((p) => p.predicted_loss > 0);
  const logarithmic = positive.length >= points.length / 2;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  holder.replaceChildren(svg);
  // The last points are so close to lossless that they would stretch the scale: four decades are shown.
  const all = (logarithmic ? positive : points).map((p) => p.predicted_loss), highest = Math.max(...all);
  const least = logarithmic ? Math.max(Math.min(...all), highest * 1e-4) : Math.min(...all);
  const shown = points.filter((p) => p.predicted_loss >= least);
  const minX = points[0].budget_bytes, maxX = Math.max(shown[shown.length - 1].budget_bytes, minX + 1);
  const inside = measured.filter((p) => p.loss >= least && p.bytes >= minX && p.bytes <= maxX);
  const most = Math.max(highest, ...inside.map((p) => p.loss));
  const x = (bytes) => left + ((bytes - minX) / (maxX - minX)) * (width - left - right);
  const scale = logarithmic ? (value) => Math.log10(Math.max(value, least)) : (value) => Math.max(value, least);
  const a = scale(least), b = scale(most);
  const y = (value) => top + ((b - scale(value)) / (b - a || 1)) * (height - top - bottom);
  svg.setAttribute("aria-label", `predicted loss falls from ${loss(highest)} at ${gib(minX)} to ${loss(least)} at ${gib(maxX)}; chosen ${gib(chosen.bytes)}, ${loss(chosen.loss)}${inside.map((p) => `; ${p.text}`).join("")}`);

  for (const value of logarithmic ? powers(a, b) : rounds(least, most)) {
    const at = y(value);
    svg.append(draw("line", { x1: left, x2: width - right, y1: at, y2: at, class: "axis" }), draw("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, short(value)));
  }
  const step = niceStep((maxX - minX) / 2 ** 30 / (width < 520 ? 4 : 8));
  const decimals = Math.max(0, Math.ceil(-Math.log10(1024 * step)));
  for (let g = Math.ceil(minX / 2 ** 30 / step) * step; g * 2 ** 30 <= maxX; g += step) {
    const at = x(g * 2 ** 30);
    svg.append(draw("text", { x: at, y: height - 12, "text-anchor": "middle" }, step >= 0.1 ? `${Number(g.toFixed(1))} GiB` : `${(1024 * g).toFixed(decimals)} MiB`));
  }

  let lastEnd = -1;
  for (const gpu of [...gpus].sort((p, q) => p.bytes - q.bytes)) {
    const at = x(gpu.bytes);
    if (at < left + 2 || at > width - right - 2) continue;
    svg.append(draw("line", { x1: at, x2: at, y1: top - 6, y2: height - bottom, class: "gpu" }));
    const half = gpu.name.length * 3.3 + 4;
    if (at - half > lastEnd && at + half < width + 6) {
      svg.append(draw("text", { x: at, y: top - 12, "text-anchor": "middle", class: "gpu-name" }, gpu.name));
      lastEnd = at + half;
    }
  }
  svg.append(draw("rect", { x: left, y: top, width: width - left - right, height: height - top - bottom, fill: "transparent", class: "hit" }));
  svg.append(draw("path", { d: shown.map((p, i) => `${i ? "L" : "M"}${x(p.budget_bytes).toFixed(1)} ${y(p.predicted_loss).toFixed(1)}`).join(""), class: "curve" }));
  for (const [bits, point] of Object.entries(uniform)) {
    if (point.predicted_loss < least || point.predicted_loss > most * 1.5 || point.tensor_bytes > maxX) continue;
    const cx = x(point.tensor_bytes), cy = y(point.predicted_loss);
    svg.append(draw("circle", { cx, cy, r: 4, class: "uniform" }, draw("title", {}, `all modules at ${bits} bits: ${gib(point.tensor_bytes)}, ${loss(point.predicted_loss)}`)));
    svg.append(draw("text", { x: cx + 8, y: cy < top + 12 ? cy + 15 : cy - 6 }, `all ${bits}`));
  }
  if (chosen.loss !== null && chosen.bytes <= maxX) {
    const at = x(chosen.bytes);
    svg.append(draw("line", { x1: at, x2: at, y1: y(chosen.loss), y2: height - bottom, class: "chosen" }), draw("circle", { cx: at, cy: y(chosen.loss), r: 7, class: "dot" }));
  }
  for (const point of inside) {
    const cx = x(point.bytes), cy = y(point.loss), r = 6;
    svg.append(draw("path", { d: `M${cx} ${cy - r}L${cx + r} ${cy}L${cx} ${cy + r}L${cx - r} ${cy}Z`, class: "measured" }, draw("title", {}, point.text)));
  }
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    if (at >= left && at <= width - right) onPick(minX + ((at - left) / (width - left - right)) * (maxX - minX));
  });
}

function powers(a, b) {
  const found = [];
  for (let e = Math.ceil(a); e <= Math.floor(b); e++) found.push(10 ** e);
  return found;
}

function rounds(least, most) {
  const step = niceStep((most - least || 1) / 5), found = [];
  for (let i = Math.ceil(least / step); i * step <= most; i++) found.push(i * step);
  return found;
}

function short(value) {
  const size = Math.abs(value);
  return size === 0 || (size >= 0.01 && size <= 1000) ? String(Number(value.toPrecision(2))) : value.toExponential(0);
}

function niceStep(rough) {
  const base = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((m) => m * base).find((step) => step >= rough);
}

// The heat map: kinds down, blocks across. `cells`: [{block, kind, bits, name, changed}]. Returns {move(dx, dy), at(event)}.
export function heatMap(holder, cells) {
  const kinds = [...new Set(cells.map((c) => c.kind))], blocks = [...new Set(cells.map((c) => c.block))].sort((p, q) => p - q);
  const label = Math.max(...kinds.map((k) => k.length)) * 7 + 12;
  const room = Math.max(holder.clientWidth, 260) - label - 4;
  const cell = Math.min(Math.max(room / Math.max(blocks.length, 1), 9), 28), tall = 22;
  const width = label + cell * blocks.length + 2, height = tall * kinds.length + 22;
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${blocks.length} blocks, ${kinds.join(", ")}` });
  const grid = new Map();
  const gap = cell > 12 ? 2 : 1;
  for (const c of cells) {
    const column = blocks.indexOf(c.block), row = kinds.indexOf(c.kind), key = `${column} ${row}`;
    if (grid.has(key)) grid.get(key).push(c);
    else grid.set(key, [c]);
  }
  kinds.forEach((kind, row) => svg.append(draw("text", { x: 0, y: row * tall + 15 }, kind)));
  for (const [key, members] of grid) {
    const [column, row] = key.split(" ").map(Number);
    const mean = members.reduce((sum, c) => sum + c.bits, 0) / members.length;
    const nearest = [2, 3, 4, 5, 6, 8, 16].reduce((p, q) => (Math.abs(q - mean) < Math.abs(p - mean) ? q : p));
    const at = { x: label + column * cell, y: row * tall, width: cell - gap, height: tall - 2, rx: 2 };
    svg.append(draw("rect", { ...at, class: `w${nearest}` }));
    if (members.some((c) => c.changed)) svg.append(draw("rect", { ...at, x: at.x + 0.75, y: at.y + 0.75, width: at.width - 1.5, height: at.height - 1.5, class: "changed" }));
  }
  const every = niceStep(Math.max(1, 34 / cell));
  blocks.forEach((block, column) => {
    if (column % Math.max(1, Math.round(every)) === 0) svg.append(draw("text", { x: label + (column + 0.5) * cell, y: height - 6, "text-anchor": "middle" }, String(block)));
  });
  const cursor = draw("rect", { class: "cursor", rx: 3, width: cell - gap + 2, height: tall, visibility: "hidden" });
  svg.append(cursor);
  holder.replaceChildren(svg);
  let column = -1, row = 0;
  const show = () => {
    cursor.setAttribute("x", label + column * cell - 1);
    cursor.setAttribute("y", row * tall - 1);
    cursor.setAttribute("visibility", "visible");
    return grid.get(`${column} ${row}`) || [];
  };
  return {
    hide: () => cursor.setAttribute("visibility", "hidden"),
    move(dx, dy) {
      column = Math.min(Math.max(column + dx, 0), blocks.length - 1);
      row = Math.min(Math.max(row + dy, 0), kinds.length - 1);
      const left = label + column * cell;
      if (left < holder.scrollLeft || left + cell > holder.scrollLeft + holder.clientWidth) holder.scrollLeft = left - holder.clientWidth / 2;
      return show();
    },
    at(event) {
      const box = svg.getBoundingClientRect();
      const c = Math.floor((event.clientX - box.left - label) / cell), r = Math.floor((event.clientY - box.top) / tall);
      if (c < 0 || r < 0 || c >= blocks.length || r >= kinds.length) return null;
      [column, row] = [c, r];
      return show();
    },
  };
}
