// Line charts in SVG, with a legend and the values under the pointer.
import { clear, el } from "./dom.js";

const WIDTH = 640, HEIGHT = 260, LEFT = 52, RIGHT = 20, TOP = 10, BOTTOM = 28;
const LABEL_HEIGHT = 13, LABEL_WIDTH = 90;

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const result = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) result.push(value);
  return result;
}

function short(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1).replace(".0e", "e");
  return size >= 1000 ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
}

// series: {name, color, dashed, points: [[x, y], ...]}; levels: horizontal lines {name, y}.
export function lineChart(title, series, { levels = [], zero = false } = {}) {
  series = series.filter(({ points }) => points.length);
  if (!series.length) return null;
  const xs = series.flatMap(({ points }) => points.map(([x]) => x));
  const ys = [...series.flatMap(({ points }) => points.map(([, y]) => y)), ...levels.map(({ y }) => y)].filter(Number.isFinite);
  const sorted = [...ys].sort((a, b) => a - b);
  // The first values of a run are far above all others: they may leave the picture.
  const high = zero ? sorted.at(-1) : sorted[Math.floor(0.97 * (sorted.length - 1))];
  const low = zero ? 0 : sorted[0], pad = 0.05 * (high - low || 1);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), zero ? 0 : low - pad, high + pad];
  const px = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
  const py = (y) => TOP + (1 - (Math.min(Math.max(y, y0 - pad), y1 + pad) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);

  const svg = el("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": summary(title, series) });
  for (const y of ticks(y0, y1, 5)) {
    svg.append(el("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: py(y), y2: py(y) }));
    svg.append(el("text", { class: "tick end", x: LEFT - 6, y: py(y) + 4 }, short(y)));
  }
  for (const x of ticks(x0, x1, 6)) svg.append(el("text", { class: "tick middle", x: px(x), y: HEIGHT - 8 }, short(x)));
  let column = 0, above = Infinity;
  for (const { name, y } of [...levels].sort((a, b) => b.y - a.y).filter(({ y }) => y <= y1)) {
    column = Math.abs(py(y) - above) < LABEL_HEIGHT ? column + 1 : 0;  // labels that would overlap stand side by side
    above = py(y);
    svg.append(el("line", { class: "level", x1: LEFT, x2: WIDTH - RIGHT, y1: py(y), y2: py(y) }));
    svg.append(el("text", { class: "tick end", x: WIDTH - RIGHT - column * LABEL_WIDTH, y: py(y) - 3 }, `${name} ${y.toFixed(3)}`));
  }
  for (const { color, dashed, points } of series) {
    const path = el("path", { d: `M${points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join("L")}` });
    path.classList.toggle("dashed", Boolean(dashed));
    path.style.stroke = color;
    svg.append(path);
  }
  const rule = el("line", { class: "rule", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  svg.append(rule);

  const values = el("span", {});
  const legend = el("figcaption", {}, el("b", {}, title), " ", series.map(({ name, color, dashed }) => {
    const key = el("i", { class: dashed ? "key dashed" : "key" });
    key.style.borderColor = color;
    return el("span", {}, key, " ", name);
  }), values);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = x0 + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (x1 - x0);
    const found = series.map(({ points }) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)));
    rule.setAttribute("x1", px(found[0][0]));
    rule.setAttribute("x2", px(found[0][0]));
    clear(values, `step ${found[0][0].toLocaleString("en")}: ${found.map(([, y]) => short(y)).join(" \u00b7 ")}`);
  });
  return el("figure", {}, legend, svg);
}

function summary(title, series) {
  return `${title}. ${series.map(({ name, points }) => `${name} ends at ${short(points.at(-1)[1])}`).join(", ")}.`;
}
