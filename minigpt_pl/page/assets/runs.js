// The view "Runs": a table of what differs between runs and of their results; a click on a heading sorts it.
import { lossChart } from "./learning.js";
import { clear, el, visible } from "./dom.js";

const RESULTS = ["state", "step", "best val/loss", "at step", "nats/char", "parameters", "tokens/s"];

export function runsView(ctx) {
  const table = el("table", { class: "runs" }), chart = el("div", { class: "charts" });
  const panel = el("section", { class: "panel" }, chart, el("div", { class: "wide" }, table));
  const state = { sort: null, down: false };

  function update() {
    const settings = [...new Set(ctx.runs.flatMap((run) => Object.keys(run.settings)))]
      .filter((name) => new Set(ctx.runs.map((run) => JSON.stringify(run.settings[name] ?? null))).size > 1);
    const columns = ["run", ...RESULTS, ...settings];
    const value = (run, name) => (name === "run" ? run.name : RESULTS.includes(name) ? run.results[name] : run.settings[name]);
    const rows = [...ctx.runs];
    if (state.sort) rows.sort((a, b) => compare(value(a, state.sort), value(b, state.sort)) * (state.down ? -1 : 1));
    clear(chart, lossChart(ctx.runs));
    clear(table,
      el("thead", {}, el("tr", {}, columns.map((name) => {
        const order = state.sort === name ? (state.down ? "descending" : "ascending") : "none";
        return el("th", { "aria-sort": order, scope: "col" }, el("button", {
          type: "button",
          onclick: () => {
            Object.assign(state, { down: state.sort === name && !state.down, sort: name });
            update();
          },
        }, name, order === "none" ? "" : state.down ? " \u2193" : " \u2191"));
      }))),
      el("tbody", {}, rows.map((run) => el("tr", {}, columns.map((name) => el("td", {}, show(value(run, name))))))));
  }

  update();
  return { name: "Runs", panel, update };
}

function compare(a, b) {
  if (a == null || b == null) return (a == null) - (b == null);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function show(value) {
  if (value == null) return "\u2014";
  if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(5)));
  return visible(typeof value === "string" ? value : JSON.stringify(value));
}
