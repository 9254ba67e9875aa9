// The drawings: plain SVG made with the DOM, so that the page needs no inline styles or scripts.

import { gib, loss, lossIn, unusable, UNUSABLE_NATS as CEILING } from "./format.js";

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
    // The parts keep their colours: a band below them is what is too much.
    svg.append(draw("rect", { x: end, y: height - 9, width: ((used - limit) / whole) * width, height: 9, class: "m-over" }), draw("rect", { x: end - 1.5, y: -5, width: 3, height: height + 10, class: "m-over" }));
  }
  return svg;
}

// The Pareto curve. `points`: [{budget_bytes, predicted_loss}], `uniform`: {width: point}, `unit`: of the losses,
// `measured`: [{bytes, loss, text}], `gpus`: [{name, bytes}], `chosen`: {bytes, loss}. Calls onPick(bytes) for a click.
export function curve(holder, { points, uniform, measured, gpus, unit, chosen, onPick }) {
  const width = Math.max(holder.clientWidth, 280), height = width < 520 ? 280 : 340;
  const left = 68, right = 14, top = 30, bottom = 52;
  const positive = points.filter((p) => p.predicted_loss > 0);
  const logarithmic = positive.length >= points.length / 2;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  holder.replaceChildren(svg);
  // The last points are so close to lossless that they would stretch the scale: four decades are shown, and always what is
  // chosen. At the other end nothing is told apart that cannot be used.
  const all = (logarithmic ? positive : points).map((p) => p.predicted_loss), highest = Math.max(...all, chosen.loss);
  const floor = logarithmic ? Math.max(Math.min(...all), Math.min(highest, CEILING) * 1e-4) : Math.min(...all);
  const least = chosen.loss > 0 ? Math.min(floor, chosen.loss) : floor;
  const inReach = points.filter((p) => p.predicted_loss >= least);
  const minX = Math.min(points[0].budget_bytes, chosen.bytes);
  const maxX = Math.max((inReach[inReach.length - 1] || points[0]).budget_bytes, chosen.bytes, minX + 1);
  const within = points.filter((p) => p.budget_bytes <= maxX);
  const inside = measured.filter((p) => p.loss >= least && p.bytes >= minX && p.bytes <= maxX);
  const whole = Math.max(highest, ...inside.map((p) => p.loss)), capped = unusable(whole, unit) && least < CEILING;
  const most = capped ? 2 * CEILING : whole;
  // One point above the cap leads the line to the edge; the others would lie along it.
  const shown = within.slice(Math.max(within.findIndex((p) => p.predicted_loss <= most) - 1, 0));
  const x = (bytes) => left + ((bytes - minX) / (maxX - minX)) * (width - left - right);
  const scale = (value) => (logarithmic ? Math.log10(Math.min(Math.max(value, least), most)) : Math.min(Math.max(value, least), most));
  const a = scale(least), b = scale(most);
  const y = (value) => top + ((b - scale(value)) / (b - a || 1)) * (height - top - bottom);
  svg.setAttribute("aria-label", `predicted loss falls from ${lossIn(highest, unit)} at ${gib(minX)} to ${loss(least)} at ${gib(maxX)}; chosen ${gib(chosen.bytes)}, ${lossIn(chosen.loss, unit)}${inside.map((p) => `; ${p.text}`).join("")}`);

  if (capped) {
    const deep = y(CEILING) - top;
    svg.append(draw("rect", { x: left, y: top, width: width - left - right, height: deep, class: "unusable" }), draw("text", { x: width - right - 6, y: top + deep - 6, "text-anchor": "end", class: "unusable-name" }, "unusable"));
  }
  for (const value of logarithmic ? powers(a, b) : rounds(least, most)) {
    if (capped && value > CEILING) continue;
    const at = y(value);
    svg.append(draw("line", { x1: left, x2: width - right, y1: at, y2: at, class: "axis" }), draw("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, short(value)));
  }
  const step = niceStep((maxX - minX) / 2 ** 30 / (width < 520 ? 4 : 8));
  const decimals = Math.max(0, Math.ceil(-Math.log10(1024 * step)));
  for (let g = Math.ceil(minX / 2 ** 30 / step) * step; g * 2 ** 30 <= maxX; g += step) {
    const at = x(g * 2 ** 30);
    svg.append(draw("text", { x: at, y: height - 30, "text-anchor": "middle" }, step >= 0.1 ? `${Number(g.toFixed(1))} GiB` : `${(1024 * g).toFixed(decimals)} MiB`));
  }
  const middle = (top + height - bottom) / 2;
  svg.append(
    draw("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle", class: "axis-title" }, "size of the checkpoint"),
    draw("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})`, class: "axis-title" }, `predicted loss${unit.startsWith("nats") ? ", nats a token" : ""}`),
  );

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
  const texts = [];
  for (const [bits, point] of Object.entries(uniform)) {
    if (point.predicted_loss < least || point.predicted_loss > most || point.tensor_bytes > maxX || point.tensor_bytes < minX) continue;
    const cx = x(point.tensor_bytes), cy = y(point.predicted_loss);
    svg.append(draw("circle", { cx, cy, r: 4, class: "uniform" }, draw("title", {}, `all modules at ${bits} bits: ${gib(point.tensor_bytes)}, ${lossIn(point.predicted_loss, unit)}`)));
    // Above or below its point, where it covers no other; else its title says it.
    const free = [cy - 6, cy + 15].find((at) => at > top + 6 && !texts.some(([tx, ty]) => Math.abs(tx - cx) < 38 && Math.abs(ty - at) < 14));
    if (free === undefined) continue;
    texts.push([cx, free]);
    svg.append(draw("text", { x: cx + 8, y: free }, `all ${bits}`));
  }
  if (Number.isFinite(chosen.bytes)) {
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
