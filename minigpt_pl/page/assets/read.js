// The view "Read": a text shaded by what the models thought of it, and what they expected at each token.
import { differenceTint, expertHue, keyLegend, MAX_NATS, scaleLegend, tint } from "./colors.js";
import { bars, predictionTitle } from "./details.js";
import { button, choice, clear, el, percent, tokenName } from "./dom.js";
import { Reading } from "./reading.js";
import { TextView } from "./text_view.js";

const PAGE_TOKENS = 1024;
const NGRAM_ORDER = 5;
const ENTROPY_SCALE = 4;

export function readView(ctx) {
  const state = { mode: "surprise", layer: 0, model: 0, page: 0, reading: null, copied: null };
  const view = new TextView("The text", { onselect: (index) => inspect(index) });
  const details = el("section", { class: "details", "aria-live": "polite" });
  const status = el("p", { class: "status" }), note = el("p", { class: "status" }), legend = el("p"), pages = el("span");
  const panel = el("section", { class: "panel" });

  const modes = [["surprise", "surprise (nats)"], ["entropy", "entropy (nats)"]];
  if (ctx.models.some((model) => model.moe)) modes.push(["expert", "expert that read it"]);
  if (ctx.models.length > 1) modes.push(["difference", `${ctx.models[1].name} minus ${ctx.models[0].name}`]);
  if (ctx.hasTrainingText) modes.push(["copied", "copied from the training text"]);
  const shade = choice("Shade by", modes, (value) => change({ mode: value }));
  const layers = choice("Layer", [], (value) => change({ layer: Number(value) }));
  const model = choice("Model", ctx.models.map(({ name }, i) => [i, name]), (value) => change({ model: Number(value) }));
  model.element.hidden = ctx.models.length < 2;

  const pasted = el("textarea", { rows: 4, "aria-label": "A text of your own", placeholder: "Paste a text here" });
  const own = el("details", {}, el("summary", {}, "Read another text"), pasted,
    el("p", {}, button("Read it", () => readOwn()), " ",
      ctx.text ? button(`Back to the ${ctx.text.name}`, () => start(ctx.text.ids)) : null));

  panel.append(el("div", { class: "controls" }, shade.element, model.element, layers.element, pages), legend, status, note, own,
    el("div", { class: "columns" }, view.element, details));

  function start(ids) {
    if (state.reading) state.reading.ended = true;
    state.reading = new Reading(ctx.client, ctx.models, ids);
    state.reading.onread = onread;
    Object.assign(state, { page: 0, copied: null });
    if (state.reading.ids === ctx.text?.ids) ctx.reading = state.reading;
    showPage();
    state.reading.run().catch((error) => clear(status, error.message));
    if (ctx.hasTrainingText) findCopies(ids);
  }

  function readOwn() {
    const { ids, unknown } = ctx.tokenizer.encode(pasted.value);
    if (ids.length < 2) return clear(note, "This text has fewer than two tokens that the model knows.");
    start(ids);
    return clear(note, unknown.size ? `Left out, because the model never saw them: ${[...unknown].map(tokenName).join(" ")}` : null);
  }

  async function findCopies(ids) {
    const tokens = ids.map((id) => ctx.vocabulary[id]), marks = await ctx.client.ask("copied", { text: tokens.join("") });
    let at = 0;
    state.copied = tokens.map((token) => {
      const copied = marks[at];
      at += token.length;
      return copied;
    });
    paint();
  }

  function showPage() {
    const { ids } = state.reading, first = state.page * PAGE_TOKENS, count = Math.ceil(ids.length / PAGE_TOKENS);
    view.setTokens(ids.slice(first, first + PAGE_TOKENS).map((id) => ctx.vocabulary[id]), first);
    state.reading.wanted = first;
    const turn = (by) => () => {
      state.page += by;
      showPage();
    };
    clear(pages, count < 2 ? null : [
      button("\u2190", turn(-1), { disabled: state.page === 0, "aria-label": "previous page" }),
      ` page ${state.page + 1} of ${count} `,
      button("\u2192", turn(1), { disabled: state.page === count - 1, "aria-label": "next page" }),
    ]);
    clear(details, el("p", { class: "hint" }, "Point at a character, or press the arrow keys, to see what the model expected there. A click holds the position."));
    paint();
  }

  function onread(model, first, last) {
    paint(first, last + 1);
    showStatus();
  }

  function showStatus() {
    const { mean, count } = state.reading.mean(state.model), all = state.reading.ids.length - 1;
    if (!count) return clear(status, "The model starts to read.");
    const part = count < all ? `${count.toLocaleString("en")} of ${all.toLocaleString("en")} tokens read` : `${all.toLocaleString("en")} tokens`;
    return clear(status, `${part}; mean surprise ${mean.toFixed(4)} nats per token.`);
  }

  function change(values) {
    Object.assign(state, values);
    paint();
    showStatus();
    if (view.selected !== null) inspect(view.selected);
  }

  function paint(first = view.first, last = view.first + view.spans.length) {
    for (let i = Math.max(first, view.first); i < Math.min(last, view.first + view.spans.length); i++) {
      view.paint(i, color(i), state.mode === "copied" && Boolean(state.copied?.[i]));
    }
    showLegend();
  }

  function color(index) {
    const { reading, model, mode } = state, prediction = reading.predictions[model][index];
    if (mode === "copied") return state.copied?.[index] ? tint("copied", 0.6) : "";
    if (mode === "expert") {
      const [top] = reading.experts(model, index, state.layer);
      return top ? tint(expertHue(top[0]), 0.25 + 0.75 * top[1]) : "";
    }
    if (!prediction) return "";
    if (mode === "entropy") return tint("entropy", prediction.entropy / ENTROPY_SCALE);
    if (mode === "surprise") return tint("surprise", prediction.nats / MAX_NATS);
    const other = reading.predictions[1][index];
    return other && reading.predictions[0][index] ? differenceTint(other.nats - reading.predictions[0][index].nats) : "";
  }

  function showLegend() {
    const { mode } = state, spec = ctx.models[state.model], moeLayers = spec.moeLayers;
    layers.element.hidden = mode !== "expert" || moeLayers.length < 1;
    if (layers.select.length !== moeLayers.length) {
      clear(layers.select, moeLayers.map((layer, i) => el("option", { value: i }, String(layer + 1))));
      state.layer = 0;
    }
    if (mode === "surprise") clear(legend, scaleLegend("surprise", "0 nats: expected", `${MAX_NATS}: a surprise`));
    if (mode === "entropy") clear(legend, scaleLegend("entropy", "0 nats: certain", `${ENTROPY_SCALE}: anything may follow`));
    if (mode === "copied") clear(legend, keyLegend([[tint("copied", 0.6), "in a span of 20 or more characters that stands in the training text"]]));
    if (mode === "difference") {
      const [a, b] = ctx.models.map(({ name }) => name);
      clear(legend, keyLegend([[tint("first", 1), `${a} expected it more`], [tint("second", 1), `${b} expected it more`]]));
    }
    if (mode === "expert") {
      if (!moeLayers.length) return clear(legend, `${spec.name} has no experts.`);
      return clear(legend, keyLegend(Array.from({ length: spec.experts }, (_, e) => [tint(expertHue(e), 1), `expert ${e}`])));
    }
    return null;
  }

  async function inspect(index) {
    const { reading, model } = state, truth = ctx.vocabulary[reading.ids[index]];
    const parts = [];
    for (const m of state.mode === "difference" ? ctx.models.keys() : [model]) {
      const prediction = reading.predictions[m][index];
      if (!prediction) continue;
      if (ctx.models.length > 1) parts.push(el("h3", {}, ctx.models[m].name));
      parts.push(predictionTitle(truth, prediction, ctx.vocabulary.length));
      parts.push(bars(prediction.top.map(([id, p]) => [ctx.vocabulary[id], p]), truth));
    }
    if (!parts.length) parts.push(el("p", {}, index ? "The model has not read this yet." : "The first token has no context."));
    ctx.models[model].moeLayers.forEach((layer, i) => {
      const experts = reading.experts(model, index, i).map(([e, weight]) => `expert ${e} (${percent(weight)})`);
      if (experts.length) parts.push(el("p", {}, el("small", {}, `layer ${layer + 1}: read by ${experts.join(", ")}`)));
    });
    const ngram = el("div");
    clear(details, parts, ngram);
    if (index > 0) {
      ctx.select({ model, sequence: reading.ids, start: reading.windowStart(model, index), index });
      if (ctx.hasTrainingText) showNgram(index, truth, ngram);
    }
  }

  async function showNgram(index, truth, element) {
    const context = [...ctx.tokenizer.decode(state.reading.ids.slice(Math.max(0, index - NGRAM_ORDER), index))];
    const target = [...truth][0];
    const { top, nats } = await ctx.client.ask("ngram", { context, order: NGRAM_ORDER, target });
    clear(element, el("h3", {}, `A ${NGRAM_ORDER}-gram model: ${nats.toFixed(2)} nats`), bars(top.slice(0, 5), target));
  }

  if (ctx.text) start(ctx.text.ids);
  else {
    own.open = true;
    clear(status, "The text of this model was not at hand when this page was made. Paste one.");
  }
  return { name: "Read", panel };
}
