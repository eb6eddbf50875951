// The view "Learning": curves of one or several runs, samples that they wrote, and the load of the experts.
import { lineColor } from "./colors.js";
import { lineChart } from "./charts.js";
import { choice, clear, el, visible } from "./dom.js";

function column(run, split, name) {
  const { columns, rows } = run.metrics[split], at = columns.indexOf(name);
  return at < 0 ? [] : rows.filter((row) => row[at] !== null).map((row) => [row[0], row[at]]);
}

// Losses of all runs in one picture. With characters as tokens the baselines stand in the same unit.
export function lossChart(runs) {
  const byCharacter = runs.every(({ tokenizer }) => tokenizer !== "bpe");
  const series = runs.flatMap((run, i) => [
    { name: `${run.name}: val`, color: lineColor(i + 4), points: column(run, "val", byCharacter ? "val/loss" : "val/nats_per_char") },
    ...(byCharacter ? [{ name: "train", color: lineColor(i + 4), dashed: true, points: column(run, "train", "train/loss") }] : []),
  ]);
  const [baselines] = runs.map((run) => run.baselines).filter(Boolean);
  const levels = Object.entries(baselines ?? {}).map(([name, y]) => ({ name, y }));
  return lineChart("Loss, nats per character", series, { levels });
}

export function learningView(ctx) {
  const panel = el("section", { class: "panel" }), charts = el("div", { class: "charts" });
  const samples = el("section"), load = el("section");
  panel.append(charts, load, samples);
  const state = { run: 0, layer: 0, sample: null };

  function simple(title, name) {
    const series = ctx.runs.map((run, i) => ({ name: run.name, color: lineColor(i + 4), points: column(run, "train", name) }));
    return lineChart(title, series, { zero: true });
  }

  function update() {
    clear(charts, lossChart(ctx.runs), simple("Learning rate", "lr"), simple("Gradient norm", "train/grad_norm"),
      simple("Balance loss of the router", "train/aux_loss"));
    if (!charts.children.length) clear(charts, el("p", { class: "hint" }, "There are no metrics yet."));
    showLoad();
    showSamples();
  }

  function runChoice() {
    const runs = choice("Run", ctx.runs.map(({ name }, i) => [i, name]), (value) => {
      Object.assign(state, { run: Number(value), sample: null });
      showLoad();
      showSamples();
    });
    runs.select.value = state.run;
    runs.element.hidden = ctx.runs.length < 2;
    return runs.element;
  }

  function showLoad() {
    const run = ctx.runs[state.run], loads = run.metrics.train.columns.filter((name) => name.startsWith("moe/load_"));
    if (!loads.length) return clear(load);
    const layers = [...new Set(loads.map((name) => Number(name.split("_")[1])))];
    const layer = choice("Layer", layers.map((l) => [l, String(l + 1)]), (value) => {
      state.layer = Number(value);
      showLoad();
    });
    layer.select.value = state.layer;
    const series = loads.filter((name) => Number(name.split("_")[1]) === state.layer).map((name) => {
      const expert = Number(name.split("_")[2]);
      return { name: `expert ${expert}`, color: lineColor(expert), points: column(run, "train", name) };
    });
    return clear(load, el("div", { class: "controls" }, runChoice(), layer.element),
      lineChart("Share of the tokens that each expert reads", series, { zero: true }));
  }

  function showSamples() {
    const { samples: all } = ctx.runs[state.run];
    if (!all.length) return clear(samples);
    const last = all.length - 1, text = el("pre", { class: "sample" }), label = el("output");
    const slider = el("input", { type: "range", min: 0, max: last, value: Math.min(state.sample ?? last, last), "aria-label": "Sample", oninput: () => move() });
    function move() {
      state.sample = Number(slider.value) === last ? null : Number(slider.value);  // null follows a run that trains
      const [step, sample] = all[slider.value];
      clear(label, ` step ${step.toLocaleString("en")}`);
      text.textContent = visible(sample);
    }
    move();
    return clear(samples, el("h2", {}, "What it wrote"), el("div", { class: "controls" }, runChoice(), slider, label), text);
  }

  update();
  return { name: "Learning", panel, update };
}
