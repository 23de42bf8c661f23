"use strict";
// Draws the plots of the page from its block of JSON, and sorts its tables. Text is only ever set as text.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8;
const colours = new Map(); // name -> index: a name has one colour on the whole page

function colourOf(name) {
  if (!colours.has(name)) colours.set(name, colours.size);
  return colours.get(name);
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

function show(value) {
  if (value === null || value === undefined) return "not measured";
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(3) + "k";
  return String(+value.toPrecision(4));
}

function interval(mark, value) {
  const range = mark.low === null || mark.high === null ? "" : ` [${show(mark.low)}, ${show(mark.high)}]`;
  return show(value) + range;
}

// Tooltips

const tip = document.getElementById("tip");

function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const right = window.scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(8, Math.min(event.pageX + 12, right)) + "px";
  tip.style.top = Math.max(8, event.pageY - tip.offsetHeight - 12) + "px";
}

function explain(node, text) {
  const read = typeof text === "function" ? text : () => text;
  for (const kind of ["pointermove", "pointerdown"]) node.addEventListener(kind, (event) => showTip(event, read(event)));
  node.addEventListener("pointerleave", () => { tip.hidden = true; });
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
  const known = values.filter((value) => value !== null && value !== undefined);
  if (withZero || !known.length) known.push(0);
  let low = Math.min(...known), high = Math.max(...known);
  const room = (high - low) * 0.08 || Math.abs(high) * 0.08 || 1;
  if (!(withZero && low === 0)) low -= room;
  if (!(withZero && high === 0)) high += room;
  return [low, high];
}

function scale(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low)) * (to - from);
}

// A frame with a y axis (and an x axis where `x` is a range): {svg, X, Y, box}.
function frame(holder, width, plot, yRange, xRange) {
  const height = Math.min(400, Math.max(240, width * 0.5));
  const box = { left: 54, right: width - 14, top: 26, bottom: height - 46 };
  const svg = make(holder, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": plot.title });
  const Y = scale(yRange[0], yRange[1], box.bottom, box.top);
  make(svg, "text", { x: 0, y: 12, class: "soft" }, plot.y);
  for (const value of ticks(yRange[0], yRange[1], height / 60)) {
    make(svg, "line", { x1: box.left, x2: box.right, y1: Y(value), y2: Y(value), class: value === 0 ? "axis" : "grid" });
    make(svg, "text", { x: box.left - 6, y: Y(value) + 4, "text-anchor": "end", class: "soft" }, show(value));
  }
  make(svg, "line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" });
  if (!xRange) return { svg, Y, box };
  const X = scale(xRange[0], xRange[1], box.left, box.right);
  for (const value of ticks(xRange[0], xRange[1], width / 110)) {
    make(svg, "line", { x1: X(value), x2: X(value), y1: box.bottom, y2: box.bottom + 5, class: "axis" });
    make(svg, "text", { x: X(value), y: box.bottom + 18, "text-anchor": "middle", class: "soft" }, show(value));
  }
  make(svg, "text", { x: box.right, y: box.bottom + 36, "text-anchor": "end", class: "soft" }, plot.x);
  return { svg, X, Y, box };
}

// Marks: colours repeat after eight names, shapes then differ.

function shape(parent, name, x, y, hollow, size = 6) {
  const index = colourOf(name), colour = index % COLOURS;
  const look = { class: hollow ? `hollow k${colour}` : `f${colour}` };
  const turn = Math.floor(index / COLOURS) % 3;
  if (turn === 0) return make(parent, "circle", { cx: x, cy: y, r: size, ...look });
  if (turn === 1) return make(parent, "rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size, ...look });
  return make(parent, "path", { d: `M${x} ${y - size * 1.3}l${size * 1.3} ${size * 1.3}l${-size * 1.3} ${size * 1.3}l${-size * 1.3} ${-size * 1.3}z`, ...look });
}

function whisker(svg, x, low, high, stroke) {
  if (low === null || high === null) return;
  const look = { class: `whisker ${stroke}` };
  make(svg, "line", { x1: x, x2: x, y1: low, y2: high, ...look });
  for (const y of [low, high]) make(svg, "line", { x1: x - 4, x2: x + 4, y1: y, y2: y, ...look });
}

function legend(holder, entries) {
  const list = html(holder, "ul");
  list.className = "legend";
  for (const { name, hollow } of entries) {
    const item = html(list, "li");
    shape(make(item, "svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }), name, 7, 7, hollow, 5);
    html(item, "span", name);
  }
}

const at = (Y, value) => (value === null ? null : Y(value));

// Plots: each draws one view into `holder`, `width` pixels wide.

function scatter(holder, width, plot, points) {
  const xRange = extent(points.map((p) => p.x), true);
  const yRange = extent(points.flatMap((p) => [p.y, p.low, p.high]), false);
  const { svg, X, Y, box } = frame(holder, width, plot, yRange, xRange);
  const taken = points.map((p) => ({ x: X(p.x) - 8, y: Y(p.y) - 8, w: 16, h: 16 }));
  for (const p of points) if (p.high !== null) taken.push({ x: X(p.x) - 4, y: Y(p.high), w: 8, h: Y(p.low) - Y(p.high) });
  for (const p of points) {
    whisker(svg, X(p.x), at(Y, p.low), at(Y, p.high), `k${colourOf(p.name) % COLOURS}`);
    const mark = shape(svg, p.name, X(p.x), Y(p.y), p.reference);
    explain(mark, `${p.name}\n${plot.x}: ${show(p.x)}\n${plot.y}: ${interval(p, p.y)}${p.note ? "\n" + p.note : ""}`);
    if (points.filter((q) => q.name === p.name).length === 1) label(svg, p.name, X(p.x), Y(p.y), box, taken);
  }
  const named = new Map(points.map((p) => [p.name, { name: p.name, hollow: p.reference }])); // many points may share one
  legend(holder, [...named.values()]);
}

// Puts a label beside a point where it covers nothing; leaves it to the legend where there is no such place.
function label(svg, name, x, y, box, taken) {
  const text = make(svg, "text", {}, name.length > 28 ? name.slice(0, 27) + "…" : name);
  const w = text.getComputedTextLength(), h = 14;
  const places = [[x + 11, y - 7], [x - 11 - w, y - 7], [x - w / 2, y - 25], [x - w / 2, y + 11]];
  const free = (r) => r.x >= box.left && r.x + w <= box.right && r.y >= box.top && r.y + h <= box.bottom
    && taken.every((t) => r.x + w < t.x || t.x + t.w < r.x || r.y + h < t.y || t.y + t.h < r.y);
  const place = places.map(([a, b]) => ({ x: a, y: b, w, h })).find(free);
  if (!place) return text.remove();
  text.setAttribute("x", place.x);
  text.setAttribute("y", place.y + 11);
  taken.push(place);
}

function bars(holder, width, plot, marks) {
  const groups = [...new Set(marks.map((m) => m.group))], series = [...new Set(marks.map((m) => m.series))];
  const yRange = extent(marks.flatMap((m) => [m.value, m.low, m.high]), !plot.dots);
  const { svg, Y, box } = frame(holder, width, plot, yRange, null);
  const band = (box.right - box.left) / groups.length, step = (band * 0.84) / series.length;
  const rows = band < 60 ? 2 : 1; // neighbouring names on two lines where they are close
  groups.forEach((group, g) => {
    const fits = Math.max(4, Math.floor((band * rows) / 7)), name = group.length > fits ? group.slice(0, fits - 1) + "…" : group;
    const where = { x: box.left + band * (g + 0.5), y: box.bottom + 18 + 14 * (g % rows), "text-anchor": "middle", class: "soft" };
    explain(make(svg, "text", where, name), group);
  });
  for (const m of marks) {
    if (m.value === null) continue;
    const colour = colourOf(m.series) % COLOURS;
    const x = box.left + band * (groups.indexOf(m.group) + 0.08) + step * series.indexOf(m.series);
    const top = Math.min(Y(m.value), plot.dots ? Y(m.value) : Y(0)), bottom = plot.dots ? top : Math.max(Y(m.value), Y(0));
    const bar = { x: x + step * 0.08, y: top, width: step * 0.84, height: Math.max(1, bottom - top), class: `bar f${colour}` };
    const mark = plot.dots ? shape(svg, m.series, x + step / 2, top, false, Math.min(5, Math.max(2, step / 3))) : make(svg, "rect", bar);
    whisker(svg, x + step / 2, at(Y, m.low), at(Y, m.high), plot.dots ? `k${colour}` : "plain");
    const cover = make(svg, "rect", { x, y: box.top, width: step, height: box.bottom - box.top, class: "cover" });
    for (const node of [mark, cover]) explain(node, `${m.series}\n${m.group}: ${interval(m, m.value)}${m.note ? "\n" + m.note : ""}`);
  }
  legend(holder, series.map((name) => ({ name, hollow: false })));
}

function lines(holder, width, plot, marks) {
  const xRange = extent(marks.flatMap((m) => m.xs), false), yRange = extent(marks.flatMap((m) => m.ys), false);
  const { svg, X, Y } = frame(holder, width, plot, yRange, xRange);
  for (const m of marks) {
    const colour = colourOf(m.name) % COLOURS;
    let path = "", joined = false;
    m.xs.forEach((x, i) => {
      if (m.ys[i] !== null) path += `${joined ? "L" : "M"}${X(x)} ${Y(m.ys[i])}`;
      joined = m.ys[i] !== null;
    });
    make(svg, "path", { d: path, class: `line k${colour}` });
    m.xs.forEach((x, i) => {
      if (m.ys[i] === null) return;
      explain(shape(svg, m.name, X(x), Y(m.ys[i]), false, 4), `${m.name}\n${plot.x} ${show(x)}: ${show(m.ys[i])}`);
    });
  }
  legend(holder, marks.map((m) => ({ name: m.name, hollow: false })));
}

function heatmap(holder, width, plot, [grid]) {
  const left = 54, cell = (width - left - 4) / grid.columns.length, tall = Math.min(26, Math.max(10, cell));
  const top = 26, height = top + tall * grid.rows.length + 24;
  const svg = make(holder, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": plot.title });
  make(svg, "text", { x: 0, y: 12, class: "soft" }, plot.y);
  make(svg, "text", { x: width - 4, y: height - 4, "text-anchor": "end", class: "soft" }, plot.x);
  const most = Math.max(...grid.values.flat().filter((v) => v !== null), 0) || 1, gap = cell > 6 ? 1 : 0;
  const every = Math.ceil(14 / tall);
  grid.values.forEach((row, r) => {
    if (r % every === 0) make(svg, "text", { x: left - 6, y: top + tall * (r + 0.5) + 4, "text-anchor": "end", class: "soft" }, grid.rows[r]);
    row.forEach((value, c) => {
      if (value === null) return;
      const look = plot.levels.length ? { class: `v${value % 4}` } : { class: "shade", "fill-opacity": 0.08 + (0.92 * value) / most };
      make(svg, "rect", { x: left + cell * c, y: top + tall * r, width: cell - gap, height: tall - 1, ...look });
    });
  });
  make(svg, "text", { x: left, y: height - 4, class: "soft" }, `${grid.columns[0]} to ${grid.columns[grid.columns.length - 1]}`);
  const cover = make(svg, "rect", { x: left, y: top, width: cell * grid.columns.length, height: tall * grid.rows.length, class: "cover" });
  explain(cover, (event) => {
    const box = cover.getBoundingClientRect();
    const r = Math.min(grid.rows.length - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * grid.rows.length)));
    const c = Math.min(grid.columns.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * grid.columns.length)));
    const value = grid.values[r][c];
    const said = value === null ? "nothing" : plot.levels.length ? plot.levels[value] : show(value);
    return `${plot.y} ${grid.rows[r]}, ${plot.x} ${grid.columns[c]}: ${said}`;
  });
  if (plot.levels.length) levelLegend(holder, plot.levels);
}

function levelLegend(holder, levels) {
  const list = html(holder, "ul");
  list.className = "legend";
  levels.forEach((name, level) => {
    const item = html(list, "li");
    make(make(item, "svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }), "rect", { width: 14, height: 14, class: `v${level % 4}` });
    html(item, "span", name);
  });
}

const DRAW = new Map(Object.entries({ scatter, bars, lines, heatmap }));

function place(figure) {
  const plot = data.plots[Number(figure.dataset.plot)];
  let shown = 0, drawn = 0;
  const select = plot.views.length > 1 ? html(figure, "select") : null;
  const holder = html(figure, "div");
  const draw = () => {
    drawn = holder.clientWidth;
    holder.replaceChildren();
    tip.hidden = true;
    if (drawn > 0 && plot.views.length) DRAW.get(plot.kind)(holder, drawn, plot, plot.views[shown].marks);
  };
  if (select) {
    select.setAttribute("aria-label", "What to show: " + plot.title);
    plot.views.forEach((view, index) => { html(select, "option", view.name).value = String(index); });
    select.addEventListener("change", () => { shown = Number(select.value); draw(); });
  }
  draw();
  new ResizeObserver(() => { if (holder.clientWidth !== drawn) draw(); }).observe(holder);
}

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

const save = document.getElementById("save");
if (save) save.addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(data.numbers, null, 2)], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
