// The view "Write": the model continues a prompt; at each token one can see the alternatives and branch off.
import { MAX_NATS, scaleLegend, tint } from "./colors.js";
import { bars, predictionTitle } from "./details.js";
import { button, choice, clear, el, number, tokenName } from "./dom.js";
import { TextView } from "./text_view.js";

export function writeView(ctx) {
  // ids: prompt and text; predictions: of each id, null in the prompt; prompt: how many ids it has.
  const state = { ids: [], predictions: [], prompt: 0, branches: [], writing: false };
  const view = new TextView("What the model wrote", { onselect: (index) => inspect(index) });
  const details = el("section", { class: "details", "aria-live": "polite" });
  const status = el("p", { class: "status" }), branches = el("p", { class: "branches" });
  const prompt = el("textarea", { rows: 2 });
  prompt.value = ctx.prompt;
  const model = choice("Model", ctx.models.map(({ name }, i) => [i, name]), () => {});
  model.element.hidden = ctx.models.length < 2;
  const fields = {
    temperature: number("Temperature", 0.8, { min: 0, step: 0.1 }),
    top_k: number("Top-k", 0, { min: 0, step: 1 }),
    top_p: number("Top-p", 1, { min: 0, max: 1, step: 0.05 }),
    seed: number("Seed", 1337, { min: 0, step: 1 }),
  };
  const count = number("Tokens", 300, { min: 1, max: 100000, step: 50 });
  const sampling = () => Object.fromEntries(Object.entries(fields).map(([name, { read }]) => [name, read()]));

  const panel = el("section", { class: "panel" },
    el("label", { class: "prompt" }, "Prompt", prompt),
    el("div", { class: "controls" }, model.element, Object.values(fields).map(({ element }) => element), count.element),
    el("div", { class: "controls" },
      button("Write", () => begin(), { class: "primary" }), button("Stop", () => ctx.client.ask("stop")),
      button("Clear", () => reset()), button("Copy", () => copy())),
    el("p", {}, scaleLegend("surprise", "0 nats: likely", `${MAX_NATS}: unlikely`)),
    status, branches, el("div", { class: "columns" }, view.element, details));

  const modelIndex = () => Number(model.select.value);
  const token = (id) => ctx.vocabulary[id];

  function begin() {
    const { ids, unknown } = ctx.tokenizer.encode(prompt.value);
    const start = ids.length ? ids : [ctx.tokenizer.ids.get("\n") ?? 0];
    state.branches = [];
    set(start, start.map(() => null), start.length);
    const note = unknown.size ? `Left out, because the model never saw them: ${[...unknown].map(tokenName).join(" ")}. ` : "";
    return write(note);
  }

  function set(ids, predictions, promptLength) {
    Object.assign(state, { ids: [...ids], predictions: [...predictions], prompt: promptLength });
    view.setTokens(ids.map(token));
    ids.forEach((_, i) => shade(i));
  }

  function shade(index) {
    const prediction = state.predictions[index];
    if (prediction) view.paint(index, tint("surprise", prediction.nats / MAX_NATS));
  }

  async function write(note = "") {
    const skip = state.ids.length - state.prompt, mine = {};
    state.writing = mine;
    clear(status, `${note}The model writes.`);
    const onpart = (part) => {
      if (state.writing !== mine) return;
      for (const { id, ...prediction } of part) {
        state.ids.push(id);
        state.predictions.push(prediction);
        view.append([token(id)]);
        shade(state.ids.length - 1);
      }
    };
    const content = { model: modelIndex(), prompt: state.ids.slice(), sampling: sampling(), count: count.read(), skip };
    const { tokensPerSecond } = await ctx.client.ask("generate", content, onpart);
    if (state.writing === mine) clear(status, `${note}${(state.ids.length - state.prompt).toLocaleString("en")} tokens; ${tokensPerSecond.toFixed(0)} tokens per second.`);
  }

  function inspect(index) {
    const prediction = state.predictions[index];
    if (!prediction) return clear(details, el("p", {}, "This is the prompt."));
    const top = prediction.top.map(([id, p]) => [token(id), p]);
    clear(details, predictionTitle(token(state.ids[index]), prediction, ctx.vocabulary.length),
      bars(top, token(state.ids[index]), (chosen) => branch(index, chosen)),
      el("p", { class: "hint" }, "Click an alternative: the text is written again from there."));
    return ctx.select({ model: modelIndex(), sequence: state.ids.slice(0, index + 1), start: windowStart(index), index });
  }

  // Where the window began in which token `index` was drawn: a full window is shortened to its last half.
  function windowStart(index) {
    const size = ctx.models[modelIndex()].spec.block_size;
    let start = Math.max(0, state.prompt - size);
    for (let length = state.prompt; length < index; length++) {
      if (length + 1 - start > size) start = length + 1 - Math.max(1, size >> 1);
    }
    return start;
  }

  async function branch(index, chosen) {
    await ctx.client.ask("stop");
    const { ids, predictions } = state, id = ctx.tokenizer.ids.get(chosen);
    state.branches.push({ ids: [...ids], predictions: [...predictions], prompt: state.prompt, at: index });
    const before = predictions[index], probability = before.top.find(([other]) => other === id)[1];
    const rank = 1 + before.top.findIndex(([other]) => other === id);
    const taken = { ...before, rank, nats: -Math.log(probability) };
    set([...ids.slice(0, index), id], [...predictions.slice(0, index), taken], state.prompt);
    showBranches();
    return write();
  }

  function showBranches() {
    clear(branches, state.branches.length ? "Earlier texts: " : null, state.branches.map(({ ids, predictions, prompt: length, at }, i) =>
      button(`${i + 1} (left at token ${at - length + 1})`, async () => {
        await ctx.client.ask("stop");
        state.writing = null;
        set(ids, predictions, length);
      })));
  }

  function reset() {
    ctx.client.ask("stop");
    state.writing = null;
    state.branches = [];
    set([], [], 0);
    showBranches();
    clear(details);
    clear(status);
  }

  async function copy() {
    const text = ctx.tokenizer.decode(state.ids);
    try {
      await navigator.clipboard.writeText(text);
      clear(status, "The text is in the clipboard.");
    } catch {
      const range = document.createRange();  // a page from a file may be refused: the text is then selected
      range.selectNodeContents(view.element);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      clear(status, "The text is selected: copy it with Ctrl-C.");
    }
  }

  return { name: "Write", panel };
}
