// Curves: small ones as SVG in tables, large ones with uPlot.

import { el, num, svg } from "./dom.js";

export const COLOURS = ["#0d9488", "#d9641c", "#6366f1", "#c026a3", "#4d7c0f", "#0284c7", "#b45309", "#7c3aed", "#be123c", "#64748b"];
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3]];
const LARGEST = 1e30, SMALLEST = 1e-30;  // beyond them uPlot has no distance between ticks
const WIDTH = 132, HEIGHT = 30;

/** The look of the n-th run: colours first, then dashes. */
export const lookOf = (n) => ({ colour: COLOURS[n % COLOURS.length], dash: DASHES[Math.floor(n / COLOURS.length) % DASHES.length] });

/** Return a small drawing of training rewards as a line and of evaluations as dots. */
export function spark(points, dots = []) {
  const all = [...points, ...dots];
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "spark", "aria-hidden": "true", preserveAspectRatio: "none" });
  if (!all.length) return drawing;
  const xs = all.map(([x]) => x), ys = all.map(([, y]) => y);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const px = (x) => (3 + ((x - x0) / (x1 - x0 || 1)) * (WIDTH - 6)).toFixed(1);
  const py = (y) => (HEIGHT - 4 - ((y - y0) / (y1 - y0 || 1)) * (HEIGHT - 8)).toFixed(1);
  if (points.length) drawing.append(svg("polyline", { class: "spark-line", points: points.map(([x, y]) => `${px(x)},${py(y)}`).join(" ") }));
  if (dots.length > 1) drawing.append(svg("polyline", { class: "spark-evals", points: dots.map(([x, y]) => `${px(x)},${py(y)}`).join(" ") }));
  if (dots.length && dots.length < 13) drawing.append(...dots.map(([x, y]) => svg("circle", { class: "spark-dot", cx: px(x), cy: py(y), r: 2 })));
  return drawing;
}

/** Return the running mean: each value weighs `weight` times what the one after it does; 0 changes nothing. */
export function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    sum = sum * weight + value * (1 - weight);
    norm = norm * weight + (1 - weight);
    return sum / norm;
  });
}

/** One metric of several runs. lines: [{ label, xs, ys, look }]. */
export class Chart {
  constructor(title, { remove, xName = () => "step", move }) {
    this.title = title;
    this.xName = xName;
    this.read = el("span", { class: "chart-read number soft" });
    this.place = el("div", { class: "chart-place" });
    this.move = move;
    this.node = el("article", { class: "card chart" },
      el("header", {}, el("h3", {}, title), this.read,
        remove && el("button", { class: "icon small", "aria-label": "remove " + title, onclick: remove }, "×")),
      this.place);
    this.resized = new ResizeObserver(() => this.plot?.setSize(this.size()));
    this.resized.observe(this.place);
  }

  size() {
    return { width: Math.max(200, this.place.clientWidth), height: 230 };
  }

  draw(lines, { weight = 0, log = false } = {}) {
    const positive = (ys) => ys.map((y) => (Math.abs(y) < LARGEST && (!log || y > SMALLEST) ? y : null));
    const drawn = [];
    for (const line of lines) {
      const ys = positive(line.ys);
      if (weight) drawn.push({ ...line, ys, faint: true });
      drawn.push({ ...line, ys: smoothed(ys, weight) });
    }
    this.lines = drawn;
    this.plot?.destroy();
    this.plot = null;
    this.place.classList.toggle("empty", !drawn.length);
    if (!drawn.length) { this.read.textContent = "no value"; return; }
    const data = uPlot.join(drawn.map((line) => [line.xs, line.ys]));
    this.plot = new uPlot(this.options(drawn, log), data, this.place);
    this.tell(null);
  }

  options(drawn, log) {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--soft").trim(), rule = style.getPropertyValue("--rule").trim();
    const axis = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    return {
      ...this.size(),
      legend: { show: false },
      padding: [10, 10, 0, 0],
      cursor: { sync: { key: "curves" }, points: { size: 6 }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: log ? decades : padded } },
      axes: [
        { ...axis, size: 28, space: 60, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : num(tick, 1))) },
        { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : num(tick))) },
      ],
      series: [{}, ...drawn.map((line) => ({
        label: line.label, stroke: line.faint ? line.look.colour + "60" : line.look.colour, width: line.faint ? 1 : 1.8,
        dash: line.look.dash, spanGaps: true, points: { show: line.xs.length < 12 && !line.faint, size: 5, fill: line.look.colour },
      }))],
      hooks: { setCursor: [(plot) => this.tell(plot.cursor.idx)] },
    };
  }

  /** Show the values under the cursor, or the last ones. */
  tell(index) {
    const [xs, ...columns] = this.plot?.data || [[]];
    const at = index ?? xs.length - 1;
    const shown = columns.map((ys, i) => [this.lines?.[i], last(ys, at)]).filter(([line, y]) => line && !line.faint && y !== null);
    const parts = shown.slice(0, 6).map(([line, y]) => {
      const mark = el("i", { class: "mark" });
      mark.style.background = line.look.colour;
      return el("span", {}, shown.length > 1 ? mark : null, num(y));
    });
    this.read.replaceChildren(el("span", {}, `${this.xName()} ${num(xs[at], 1)}`), ...parts, shown.length > 6 ? "…" : "");
  }

  close() {
    this.resized.disconnect();
    this.plot?.destroy();
  }
}

/** Return the range of an axis; differences of rounding alone are none, and uPlot could not put ticks between them. */
function padded(_, low, high) {
  if (low === null || low === undefined) return [0, 1];
  const size = Math.max(Math.abs(low), Math.abs(high)) || 1;
  const space = (high - low > size * 1e-6 ? high - low : size) * 0.06;
  return [low - space, high + space];
}

/** Return whole powers of ten around the values. */
function decades(_, low, high) {
  if (!(low > 0)) return [0.1, 1];
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  return [10 ** from, 10 ** Math.max(to, from + 1)];
}

/** Return the newest value up to a place: runs were not measured at each other's steps. */
function last(ys, at) {
  for (let i = at; i >= 0; i--) if (ys[i] !== null && ys[i] !== undefined) return ys[i];
  return null;
}
