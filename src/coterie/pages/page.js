"use strict";
// Draws the plots of the page from its block of JSON, sorts its tables, follows its budget. Text is only ever set as text.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8, SHADES = 16;
const SHAPES = [ // about a circle of radius 1: disc, square, diamond, triangles, plus, star
  "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z", "M-.9-.9h1.8v1.8h-1.8z", "M0-1.3 1.3 0 0 1.3-1.3 0z", "M0-1.2 1.2 .9h-2.4z",
  "M0 1.2 1.2-.9h-2.4z", "M-.4-1.2h.8v.8h.8v.8h-.8v.8h-.8v-.8h-.8v-.8h.8z", "M0-1.5 .4-.4 1.5 0 .4.4 0 1.5-.4.4-1.5 0-.4-.4z",
];
const styles = new Map(); // name -> index: a name has one colour and one shape on the whole page

function styleOf(name) {
  if (!styles.has(name)) styles.set(name, styles.size);
  return styles.get(name);
}

function make(parent, tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

function html(parent, tag, text = null) {
  const node = document.createElement(tag);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

function sized(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.max(0, units.findIndex((unit, p) => bytes < 999.5 * 1000 ** p || p === units.length - 1));
  const value = bytes / 1000 ** power;
  return `${+value.toFixed(value >= 99.5 ? 0 : value >= 9.95 ? 1 : 2)} ${units[power]}`;
}

function show(value, what = "") {
  if (value === null || value === undefined) return "not measured";
  if (what === "bytes") return sized(value);
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(3) + "k";
  return String(+value.toPrecision(4));
}

const known = (mark) => mark.low !== undefined && mark.high !== undefined; // what is nothing is left out

function interval(mark, value) {
  return show(value) + (known(mark) ? ` [${show(mark.low)}, ${show(mark.high)}]` : "");
}

const short = (text, most) => (text.length > most ? text.slice(0, Math.max(1, most - 1)) + "…" : text);

// Tooltips, for pointers and for the keyboard

const tip = document.getElementById("tip");

function showTip(x, y, text) {
  tip.textContent = text;
  tip.hidden = false;
  const right = window.scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(8, Math.min(x + 12, right)) + "px";
  tip.style.top = Math.max(8, y - tip.offsetHeight - 12) + "px";
}

function hideTip() { tip.hidden = true; }

function showBeside(node, text) {
  const box = node.getBoundingClientRect();
  showTip(box.left + box.width / 2 + window.scrollX, box.top + window.scrollY, text);
}

function explain(node, text) {
  for (const kind of ["pointermove", "pointerdown"]) node.addEventListener(kind, (event) => showTip(event.pageX, event.pageY, text));
  node.addEventListener("pointerleave", hideTip);
  node.setAttribute("tabindex", "0");
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", text);
  node.addEventListener("focus", () => { if (node.matches(":focus-visible")) showBeside(node, text); });
  node.addEventListener("blur", hideTip);
}

// Axes

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

function extent(values, withZero) {
  const some = values.filter((value) => value !== null && value !== undefined);
  if (withZero || !some.length) some.push(0);
  let low = Math.min(...some), high = Math.max(...some);
  const room = (high - low) * 0.08 || Math.abs(high) * 0.08 || 1;
  if (!(withZero && low === 0)) low -= room;
  if (!(withZero && high === 0)) high += room;
  return [low, high];
}

function scale([low, high], from, to) {
  return (value) => from + ((value - low) / (high - low)) * (to - from);
}

function drawing(holder, width, height, plot) {
  return make(holder, "svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": plot.title });
}

function xAxis(svg, plot, box, range) {
  const X = scale(range, box.left, box.right);
  make(svg, "line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" });
  for (const value of ticks(range[0], range[1], (box.right - box.left) / 90)) {
    make(svg, "line", { x1: X(value), x2: X(value), y1: box.bottom, y2: box.bottom + 5, class: "axis" });
    make(svg, "text", { x: X(value), y: box.bottom + 18, "text-anchor": "middle", class: "soft" }, show(value, plot.x));
  }
  make(svg, "text", { x: box.right, y: box.bottom + 36, "text-anchor": "end", class: "soft" }, plot.x);
  return X;
}

// A frame with two axes: {svg, X, Y, box}.
function frame(holder, width, plot, yRange, xRange) {
  const height = Math.min(400, Math.max(220, width * 0.5));
  const box = { left: 54, right: width - 14, top: 26, bottom: height - 46 };
  const svg = drawing(holder, width, height, plot), Y = scale(yRange, box.bottom, box.top);
  make(svg, "text", { x: 0, y: 12, class: "soft" }, plot.y);
  for (const value of ticks(yRange[0], yRange[1], height / 60)) {
    make(svg, "line", { x1: box.left, x2: box.right, y1: Y(value), y2: Y(value), class: value === 0 ? "axis" : "grid" });
    make(svg, "text", { x: box.left - 6, y: Y(value) + 4, "text-anchor": "end", class: "soft" }, show(value));
  }
  return { svg, X: xAxis(svg, plot, box, xRange), Y, box };
}

// Marks

function shape(parent, style, x, y, hollow, size = 6) {
  const index = styleOf(style), look = hollow ? `hollow k${index % COLOURS}` : `f${index % COLOURS}`;
  const where = `translate(${x} ${y}) scale(${size})`;
  return make(parent, "path", { d: SHAPES[index % SHAPES.length], transform: where, class: `mark ${look}` });
}

function whisker(svg, style, [x1, y1], [x2, y2]) {
  const look = { class: `whisker k${styleOf(style) % COLOURS}` }, across = y1 === y2 ? [0, 4] : [4, 0];
  make(svg, "line", { x1, y1, x2, y2, ...look });
  for (const [x, y] of [[x1, y1], [x2, y2]]) {
    make(svg, "line", { x1: x - across[0], x2: x + across[0], y1: y - across[1], y2: y + across[1], ...look });
  }
}

// What colours and shapes stand for; a reference, hollow, beside its kind.
function legend(holder, entries) {
  const list = html(holder, "ul");
  list.className = "legend";
  const named = new Map(entries.filter(([style]) => style).map(([style, hollow]) => [style + Boolean(hollow), [style, hollow]]));
  for (const [style, hollow] of named.values()) {
    const item = html(list, "li");
    shape(make(item, "svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }), style, 7, 7, hollow, 5);
    html(item, "span", hollow ? `${style} (to compare with)` : style);
  }
}

// Plots: each draws one view into `holder`, `width` pixels wide.

function scatter(holder, width, plot, points) {
  const xRange = extent(points.map((p) => p.x), true);
  const yRange = extent(points.flatMap((p) => [p.y, p.low, p.high]), false);
  const { svg, X, Y, box } = frame(holder, width, plot, yRange, xRange);
  const front = points.filter((p) => p.front).sort((a, b) => a.x - b.x);
  if (front.length > 1) {
    const steps = front.slice(1).map((p) => `H${X(p.x)}V${Y(p.y)}`).join("");
    make(svg, "path", { d: `M${X(front[0].x)} ${Y(front[0].y)}${steps}`, class: "front" });
  }
  if (plot.x === "bytes" && budget !== null && budget <= xRange[1]) {
    make(svg, "line", { x1: X(budget), x2: X(budget), y1: box.top, y2: box.bottom, class: "budget" });
    const side = X(budget) > (box.left + box.right) / 2 ? ["end", -6] : ["start", 6];
    make(svg, "text", { x: X(budget) + side[1], y: box.top + 4, "text-anchor": side[0], class: "soft" }, `budget ${sized(budget)}`);
  }
  const taken = points.map((p) => ({ x: X(p.x) - 8, y: Y(p.y) - 8, w: 16, h: 16 }));
  for (const p of points.filter(known)) taken.push({ x: X(p.x) - 4, y: Y(p.high), w: 8, h: Y(p.low) - Y(p.high) });
  for (const p of points) {
    const style = p.kind || p.name;
    if (known(p)) whisker(svg, style, [X(p.x), Y(p.low)], [X(p.x), Y(p.high)]);
    const mark = shape(svg, style, X(p.x), Y(p.y), p.reference);
    const values = [`${plot.x}: ${show(p.x, plot.x)}`, `${plot.y}: ${interval(p, p.y)}`];
    explain(mark, [p.name, ...values, p.note].filter(Boolean).join("\n"));
    if (p.name) label(svg, p.name, X(p.x), Y(p.y), box, taken);
    else mark.removeAttribute("tabindex"); // one of a cloud
  }
  legend(holder, points.map((p) => [p.kind, p.reference]));
}

// Puts a label near a point where it covers no other, with a line to it where that is not close; or leaves it out.
function label(svg, name, x, y, box, taken) {
  const text = make(svg, "text", {}, short(name, 28));
  const w = text.getComputedTextLength(), h = 14;
  const around = (d) => [[x + d, y - 7], [x - d - w, y - 7], [x - w / 2, y - 14 - d], [x - w / 2, y + d], [x + d, y - 14 - d],
    [x + d, y + d], [x - d - w, y - 14 - d], [x - d - w, y + d]];
  const free = (r) => r.x >= box.left && r.x + w <= box.right && r.y >= box.top && r.y + h <= box.bottom
    && taken.every((t) => r.x + w < t.x || t.x + t.w < r.x || r.y + h < t.y || t.y + t.h < r.y);
  const place = [11, 24, 40, 60].flatMap(around).map(([a, b]) => ({ x: a, y: b, w, h })).find(free);
  if (!place) return text.remove();
  text.setAttribute("x", place.x);
  text.setAttribute("y", place.y + 11);
  taken.push(place);
  const end = { x2: Math.min(Math.max(x, place.x), place.x + w), y2: Math.min(Math.max(y, place.y), place.y + h) };
  if (Math.hypot(x - end.x2, y - end.y2) > 16) make(svg, "line", { x1: x, y1: y, ...end, class: "leader" });
}

function rows(holder, width, plot, marks) {
  const tall = width < 480 ? 20 : 24, left = Math.min(width * 0.36, 14 + 7 * Math.max(...marks.map((m) => m.name.length)));
  const box = { left, right: width - 64, top: 4, bottom: 8 + tall * marks.length };
  const svg = drawing(holder, width, box.bottom + 42, plot);
  const range = extent(marks.flatMap((m) => [m.value, m.low, m.high]), false), X = xAxis(svg, plot, box, range);
  if (range[0] < 0 && range[1] > 0) make(svg, "line", { x1: X(0), x2: X(0), y1: box.top, y2: box.bottom, class: "axis" });
  marks.forEach((m, i) => {
    const y = box.top + tall * (i + 0.5), style = m.kind || plot.title;
    make(svg, "line", { x1: box.left, x2: box.right, y1: y, y2: y, class: "grid" });
    make(svg, "text", { x: 0, y: y + 4 }, short(m.name, Math.floor((left - 8) / 7)));
    make(svg, "text", { x: width, y: y + 4, "text-anchor": "end" }, m.value === undefined ? "–" : show(+m.value.toPrecision(3)));
    if (m.value === undefined) return;
    if (known(m)) whisker(svg, style, [X(m.low), y], [X(m.high), y]);
    explain(shape(svg, style, X(m.value), y, m.reference), [m.name, `${plot.x}: ${interval(m, m.value)}`, m.note].filter(Boolean).join("\n"));
  });
}

function lines(holder, width, plot, marks) {
  const xRange = extent(marks.flatMap((m) => m.xs), false), yRange = extent(marks.flatMap((m) => m.ys), false);
  const { svg, X, Y } = frame(holder, width, plot, yRange, xRange);
  for (const m of marks) {
    let path = "", joined = false;
    m.xs.forEach((x, i) => {
      if (m.ys[i] !== null) path += `${joined ? "L" : "M"}${X(x)} ${Y(m.ys[i])}`;
      joined = m.ys[i] !== null;
    });
    const line = make(svg, "path", { d: path, class: `line k${styleOf(m.name) % COLOURS}` });
    explain(line, `${m.name}\n${m.xs.map((x, i) => `${show(x)}: ${show(m.ys[i])}`).join("\n")}`);
    m.xs.forEach((x, i) => { if (m.ys[i] !== null) shape(svg, m.name, X(x), Y(m.ys[i]), false, 4); });
  }
  legend(holder, marks.map((m) => [m.name, false]));
}

// A grid of shades: its values are bytes, of which 0 is nothing.
function heatmap(holder, width, plot, [grid]) {
  const codes = Uint8Array.from(atob(grid.codes), (c) => c.charCodeAt(0));
  const top = 26, [high, wide] = [grid.rows.length, grid.columns.length];
  const most = Math.max(...grid.rows.map((name) => name.length)), left = Math.min(width * 0.3, Math.max(54, 10 + 7 * most));
  const cell = Math.min(40, (width - left - 4) / wide), tall = Math.min(20, Math.max(5, Math.min(cell, 360 / high)));
  const svg = drawing(holder, width, top + tall * high + 24, plot);
  make(svg, "text", { x: 0, y: 12, class: "soft" }, plot.y);
  make(svg, "text", { x: left + cell * wide, y: top + tall * high + 18, "text-anchor": "end", class: "soft" }, plot.x);
  make(svg, "text", { x: left, y: top + tall * high + 18, class: "soft" }, `${grid.columns[0]} to ${grid.columns[wide - 1]}`);
  grid.rows.forEach((name, r) => {
    if (r % Math.ceil(14 / tall) === 0) make(svg, "text", { x: left - 6, y: top + tall * (r + 0.5) + 4, "text-anchor": "end", class: "soft" }, short(name, Math.floor((left - 6) / 7)));
  });
  const gap = cell > 8 ? 1 : 0, paths = new Map();
  codes.forEach((code, i) => {
    const level = plot.levels.length ? code - 1 : Math.floor(((code - 1) / 255) * SHADES);
    const square = `M${(left + cell * (i % wide)).toFixed(1)} ${(top + tall * Math.floor(i / wide)).toFixed(1)}h${(cell - gap).toFixed(1)}v${(tall - gap).toFixed(1)}h${(gap - cell).toFixed(1)}z`;
    if (code) paths.set(level, (paths.get(level) || "") + square);
  });
  for (const [level, d] of paths) make(svg, "path", { d, ...shade(plot, level) });
  const said = (code) => (code === 0 ? "nothing" : plot.levels.length ? plot.levels[code - 1] : show(+(plot.low + (code - 1) * plot.step).toPrecision(3)));
  const words = (r, c) => `${plot.y} ${grid.rows[r]}, ${plot.x} ${grid.columns[c]}: ${said(codes[r * wide + c])}`;
  follow(make(svg, "rect", { x: left, y: top, width: cell * wide, height: tall * high, class: "cover" }), high, wide, words);
  colourScale(holder, plot);
}

function shade(plot, level) {
  return plot.levels.length ? { class: `v${level % 4}` } : { class: "shade", "fill-opacity": (0.04 + (0.96 * level) / (SHADES - 1)).toFixed(3) };
}

// Says the cell of a grid under the pointer, or the one that arrow keys lead to.
function follow(cover, high, wide, words) {
  let row = 0, column = 0;
  const between = (value, most) => Math.min(most - 1, Math.max(0, Math.floor(value)));
  const point = (event) => {
    const box = cover.getBoundingClientRect();
    row = between(((event.clientY - box.top) / box.height) * high, high);
    column = between(((event.clientX - box.left) / box.width) * wide, wide);
    showTip(event.pageX, event.pageY, words(row, column));
  };
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  for (const kind of ["pointermove", "pointerdown"]) cover.addEventListener(kind, point);
  cover.addEventListener("pointerleave", hideTip);
  cover.addEventListener("blur", hideTip);
  cover.setAttribute("tabindex", "0");
  cover.setAttribute("role", "img");
  cover.setAttribute("aria-label", "A grid; arrow keys read its cells");
  cover.addEventListener("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    row = between(row + steps[event.key][0], high);
    column = between(column + steps[event.key][1], wide);
    showBeside(cover, words(row, column));
  });
}

// What the colours of a grid mean: a box for each level, or the shades between the lowest and the highest value.
function colourScale(holder, plot) {
  const list = html(holder, "ul");
  list.className = "legend";
  const box = (item, wide, levels) => {
    const svg = make(item, "svg", { viewBox: `0 0 ${wide} 14`, "aria-hidden": "true" });
    levels.forEach((level, i) => make(svg, "rect", { x: (i * wide) / levels.length, width: wide / levels.length, height: 14, ...shade(plot, level) }));
    return svg;
  };
  plot.levels.forEach((name, level) => {
    const item = html(list, "li");
    box(item, 14, [level]);
    html(item, "span", name);
  });
  if (plot.levels.length) return;
  const item = html(list, "li");
  html(item, "span", show(+plot.low.toPrecision(3)));
  box(item, 140, [...Array(SHADES).keys()]).classList.add("wide");
  html(item, "span", show(+(plot.low + 254 * plot.step).toPrecision(3)));
}

const DRAW = new Map(Object.entries({ scatter, rows, lines, heatmap }));
const redraws = []; // of plots along bytes

function place(figure) {
  const plot = data.plots[Number(figure.dataset.plot)];
  let shown = 0, drawn = 0;
  const select = plot.views.length > 1 ? html(figure, "select") : null;
  const holder = html(figure, "div");
  const draw = () => {
    drawn = holder.clientWidth;
    holder.replaceChildren();
    hideTip();
    if (drawn > 0 && plot.views.length) DRAW.get(plot.kind)(holder, drawn, plot, plot.views[shown].marks);
  };
  if (select) {
    select.setAttribute("aria-label", "What to show: " + plot.title);
    plot.views.forEach((view, index) => { html(select, "option", view.name).value = String(index); });
    select.addEventListener("change", () => { shown = Number(select.value); draw(); });
  }
  draw();
  if (plot.x === "bytes") redraws.push(draw);
  new ResizeObserver(() => { if (holder.clientWidth !== drawn) draw(); }).observe(holder);
}

// The budget: the last sentence whose bytes fit holds.

const ceiling = document.getElementById("budget");
let budget = ceiling ? Number(ceiling.dataset.budget) : null;
if (ceiling) ceiling.querySelector("input").addEventListener("input", (event) => {
  budget = Number(event.target.value);
  ceiling.querySelector("output").textContent = sized(budget);
  const fitting = JSON.parse(ceiling.dataset.steps).filter(([bytes]) => bytes <= budget);
  ceiling.querySelector("strong").textContent = fitting[fitting.length - 1][1];
  for (const draw of redraws) draw();
});

// Tables: a click on a head sorts by its column, a second one the other way; what was not measured stays last.

function key(cell) {
  if (cell.classList.contains("none")) return null;
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortBy(table, column) {
  const head = table.tHead.rows[0].cells, body = table.tBodies[0];
  const ascending = head[column].getAttribute("aria-sort") !== "ascending";
  for (const cell of head) cell.removeAttribute("aria-sort");
  head[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const rows = [...body.rows].map((row) => ({ row, value: key(row.cells[column]) }));
  rows.sort((a, b) => (a.value === null) - (b.value === null) || (ascending ? 1 : -1) * (a.value === null ? 0 : compare(a.value, b.value)));
  body.append(...rows.map(({ row }) => row));
}

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => cell.addEventListener("click", () => sortBy(table, column)));
}
for (const figure of document.querySelectorAll("figure[data-plot]")) place(figure);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
window.addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details")) fold.open = true; });

const save = document.getElementById("save");
if (save) save.addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(data.numbers, null, 2)], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
