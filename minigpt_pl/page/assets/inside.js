// The view "Inside": what the layers did at the position that was pointed at in "Read" or "Write".
import { expertHue, lineColor, tint } from "./colors.js";
import { bars } from "./details.js";
import { choice, clear, el, percent, tokenName } from "./dom.js";
import { TextView } from "./text_view.js";

const LENS_TOKENS = 3;
const FAVOURITES = 12;
const LEAST_COUNT = 10;  // a character that is rarer says little

export function insideView(ctx) {
  const state = { selection: null, trace: null, layer: null, head: null, asked: 0, visible: false };
  const heading = el("h2"), heads = el("div", { class: "heads" }), side = el("section", { class: "details" });
  const view = new TextView("The context", { onselect: (i) => showWeight(i), onpin: (i) => move(i) });
  const weight = el("p", { class: "status" }), favourites = el("section");
  const hint = el("p", { class: "hint" }, "Point at a character in Read or Write first; then this page shows what the layers did there.");
  const panel = el("section", { class: "panel" }, hint, heading, heads, weight,
    el("div", { class: "columns" }, view.element, side), favourites);

  ctx.onselect = (selection) => {
    state.selection = selection;
    if (state.visible) refresh();
  };

  async function refresh() {
    const { selection } = state;
    showFavourites();
    if (!selection) return;
    const { model, sequence, start, index } = selection, asked = ++state.asked;
    const size = ctx.models[model].spec.block_size;
    const ids = sequence.slice(start, start + size);
    const trace = await ctx.client.ask("trace", { model, ids, row: index - 1 - start });
    if (asked !== state.asked) return;
    state.trace = trace;
    hint.hidden = true;
    clear(heading, `Before ${tokenName(ctx.vocabulary[sequence[index]])}, token ${index} of ${ctx.models[model].name}`);
    view.setTokens(sequence.slice(start, index + 1).map((id) => ctx.vocabulary[id]), start);
    view.select(index);
    showHeads();
    showAttention();
    showSide();
  }

  // One strip for each head: attention over the positions of the context, oldest left.
  function showHeads() {
    const rows = state.trace.attention.map((layer, l) => layer.length === 0 ? [] : el("div", { class: "row" }, el("small", {}, `layer ${l + 1}`),
      layer.map((weights, h) => {
        const canvas = el("canvas", { width: 160, height: 16 });
        drawStrip(canvas, weights, lineColor(4));
        const chosen = state.layer === l && state.head === h;
        return el("button", {
          type: "button", class: "head", "aria-pressed": String(chosen), title: `layer ${l + 1}, head ${h + 1}`,
          onclick: () => {
            Object.assign(state, chosen ? { layer: null, head: null } : { layer: l, head: h });
            showHeads();
            showAttention();
          },
        }, canvas);
      })));
    clear(heads, el("p", {}, el("small", {}, "Attention of each head over the context, the newest character at the right. Click one to shade the text by it; without a choice the mean of all heads is shown.")), rows);
  }

  function drawStrip(canvas, weights, color) {
    const draw = canvas.getContext("2d"), width = canvas.width / weights.length, strength = contrast(weights);
    const probe = el("i");
    probe.style.color = color;
    panel.append(probe);
    draw.fillStyle = getComputedStyle(probe).color;
    probe.remove();
    weights.forEach((weight, j) => {
      draw.globalAlpha = strength(weight);
      draw.fillRect(j * width, 0, Math.max(1, width), canvas.height);
    });
  }

  // The least weight is white and the largest one full: attention may be close to even.
  function contrast(weights) {
    const low = Math.min(...weights), high = Math.max(...weights);
    return (weight) => (weight - low) / (high - low || 1);
  }

  function attention() {
    const all = state.trace.attention;
    if (state.layer !== null) return all[state.layer]?.[state.head] ?? all.flat()[0];
    const heads = all.flat();
    return heads[0].map((_, j) => heads.reduce((sum, head) => sum + head[j], 0) / heads.length);
  }

  function showAttention() {
    const weights = attention(), strength = contrast(weights);
    weights.forEach((value, j) => view.paint(state.selection.start + j, tint("entropy", strength(value))));
    const range = `${percent(Math.min(...weights))} to ${percent(Math.max(...weights))}; an even share is ${percent(1 / weights.length)}`;
    clear(weight, `Weights from ${range}. Point at a character of the context to see its weight; a click looks inside at that character.`);
  }

  function showWeight(index) {
    const { start, sequence } = state.selection, value = attention()[index - start];
    if (value === undefined) return;
    const which = state.layer === null ? "the mean of all heads" : `head ${state.head + 1} of layer ${state.layer + 1}`;
    clear(weight, `${which}: ${percent(value)} on ${tokenName(ctx.vocabulary[sequence[index]])}`);
  }

  function move(index) {
    const { selection } = state;
    if (index <= selection.start || index === selection.index) return;
    state.selection = { ...selection, index };
    refresh();
  }

  function showSide() {
    const { model, sequence, index } = state.selection, spec = ctx.models[model], { lens, router, taps } = state.trace;
    const truth = ctx.vocabulary[sequence[index]];
    const parts = [el("h3", {}, "The prediction after each layer")];
    lens.forEach((top, layer) => parts.push(el("p", {}, el("small", {}, `layer ${layer + 1}`)),
      bars(top.slice(0, LENS_TOKENS).map(([id, p]) => [ctx.vocabulary[id], p]), truth)));
    if (router.length) parts.push(el("h3", {}, "The router's probabilities"));
    router.forEach((probabilities, i) => parts.push(el("p", { class: "router" }, el("small", {}, `layer ${spec.moeLayers[i] + 1} `),
      probabilities.map((p, e) => {
        const chip = el("span", { class: "chip" }, `${e}: ${percent(p)}`);
        chip.style.backgroundColor = tint(expertHue(e), p);
        return chip;
      }))));
    if (taps.length) {
      parts.push(el("h3", {}, "Short convolutions: how much each position adds"));
      parts.push(el("table", {}, el("tr", {}, el("th", {}, "before"),
        taps[0].strengths.map((_, back) => el("th", {}, back ? `\u2212${back}` : "now"))),
      taps.map(({ name, strengths }) => {
        const [, layer, conv] = name.match(/blocks\.(\d+)\.conv_(\d)/), sum = strengths.reduce((a, b) => a + b);
        return el("tr", {}, el("th", {}, `${conv === "1" ? "attention" : "feed-forward"} ${Number(layer) + 1}`),
          strengths.map((strength) => {
            const cell = el("td", {}, percent(strength / sum));
            cell.style.backgroundColor = tint("entropy", strength / sum);
            return cell;
          }));
      })));
    }
    clear(side, parts);
  }

  // For each expert, the characters of the text that it read more often than other characters.
  function showFavourites() {
    const model = state.selection?.model ?? ctx.models.findIndex(({ moe }) => moe), { reading } = ctx;
    if (model < 0 || !ctx.models[model].moe || !reading) return clear(favourites);
    const { moeLayers, experts } = ctx.models[model];
    const layer = choice("Layer", moeLayers.map((l, i) => [i, `${l + 1}`]), () => fill());
    layer.select.value = state.favouriteLayer ?? 0;
    const table = el("table", { class: "favourites" });
    function fill() {
      state.favouriteLayer = layer.select.value;
      const counts = Array.from({ length: experts }, () => new Map()), totals = new Map();
      let all = 0;
      reading.ids.forEach((id, i) => {
        const [top] = reading.experts(model, i, Number(layer.select.value));
        if (!top) return;
        counts[top[0]].set(id, (counts[top[0]].get(id) ?? 0) + 1);
        totals.set(id, (totals.get(id) ?? 0) + 1);
        all++;
      });
      clear(table, el("tr", {}, ["expert", "share", "favourite characters: how many of them it read"].map((name) => el("th", {}, name))),
        counts.map((map, e) => {
          const load = [...map.values()].reduce((a, b) => a + b, 0);
          const best = [...map].filter(([id]) => totals.get(id) >= LEAST_COUNT)
            .sort((a, b) => b[1] / totals.get(b[0]) - a[1] / totals.get(a[0]) || b[1] - a[1]).slice(0, FAVOURITES);
          const name = el("th", {}, `expert ${e}`);
          name.style.backgroundColor = tint(expertHue(e), 0.8);
          return el("tr", {}, name, el("td", {}, percent(load / (all || 1))), el("td", {}, best.map(([id, n]) =>
            el("span", { class: "chip" }, el("b", {}, tokenName(ctx.vocabulary[id])), ` ${percent(n / totals.get(id))}`))));
        }));
    }
    fill();
    return clear(favourites, el("h2", {}, "What each expert reads"), el("div", { class: "controls" }, layer.element), table);
  }

  return {
    name: "Inside", panel,
    show() {
      state.visible = true;
      refresh();
    },
    hide() {
      state.visible = false;
    },
  };
}
