// The page: unpacks its data, starts the worker, and shows one view at a time.
import { Client } from "./client.js";
import { clear, el } from "./dom.js";
import { insideView } from "./inside.js";
import { learningView } from "./learning.js";
import { readView } from "./read.js";
import { runsView } from "./runs.js";
import { Tokenizer } from "./tokenizer.js";
import { bytesOfBase64 } from "./weights.js";
import { writeView } from "./write.js";

const REFRESH_MS = 3000;
const app = document.getElementById("app");
const embedded = (id) => document.getElementById(id)?.textContent;

async function unpack(base64) {
  const stream = new Blob([bytesOfBase64(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

async function main() {
  const payload = await unpack(embedded("payload"));
  const ctx = { ...payload, select: (selection) => ctx.onselect?.(selection) };
  const views = [];
  if (payload.models.length) {
    await startModels(ctx, payload);
    views.push(readView(ctx), writeView(ctx), insideView(ctx));
  }
  if (ctx.runs.length) views.push(learningView(ctx));
  if (!payload.models.length || ctx.runs.length > 1) views.push(runsView(ctx));
  if (!payload.models.length) views.reverse();
  showTabs(payload.title, views);
  if (payload.live) setInterval(() => refresh(ctx, views), REFRESH_MS);
}

async function startModels(ctx, payload) {
  ctx.client = new Client(embedded("worker"));
  ctx.tokenizer = new Tokenizer(payload.tokenizer);
  ctx.vocabulary = payload.tokenizer.vocabulary;
  ctx.hasTrainingText = Boolean(payload.training_text);
  payload.models.forEach(({ spec, shapes }, i) => {
    ctx.client.ask("addModel", { spec, shapes, weights: embedded(`weights-${i}`) });
    ctx.models[i].moeLayers = spec.blocks.flatMap(({ feed_forward }, layer) => (feed_forward.kind === "moe" ? [layer] : []));
    ctx.models[i].moe = ctx.models[i].moeLayers.length > 0;
    const first = spec.blocks[ctx.models[i].moeLayers[0]]?.feed_forward;
    ctx.models[i].experts = first?.n_experts ?? 0;
    ctx.models[i].top_k = first?.top_k ?? 0;
  });
  if (ctx.hasTrainingText) {
    const characters = new Set(payload.tokenizer.vocabulary.filter((token) => [...token].length === 1)).size;
    ctx.client.ask("setTrainingText", { text: payload.training_text, characters });
  }
  globalThis.minigpt = ctx;  // for the console, and for tests
}

function showTabs(title, views) {
  const tabs = views.map((view, i) => el("button", {
    type: "button", role: "tab", id: `tab-${i}`, "aria-controls": `panel-${i}`,
    onclick: () => show(i),
    onkeydown: (event) => {
      const next = { ArrowRight: i + 1, ArrowLeft: i - 1 }[event.key];
      if (next === undefined) return;
      const at = (next + views.length) % views.length;
      show(at);
      tabs[at].focus();
    },
  }, view.name));
  let shown = -1;
  function show(index) {
    if (shown >= 0 && shown !== index) views[shown].hide?.();
    shown = index;
    views.forEach((view, i) => {
      view.panel.hidden = i !== index;
      tabs[i].setAttribute("aria-selected", String(i === index));
      tabs[i].tabIndex = i === index ? 0 : -1;
    });
    views[index].show?.();
  }
  views.forEach((view, i) => {
    view.panel.id = `panel-${i}`;
    view.panel.setAttribute("role", "tabpanel");
    view.panel.setAttribute("aria-labelledby", `tab-${i}`);
  });
  clear(app, el("header", {}, el("h1", {}, title), el("nav", { role: "tablist", "aria-label": "Views" }, tabs)), views.map(({ panel }) => panel));
  show(0);
}

async function refresh(ctx, views) {
  try {
    const answer = await fetch("/data.json");
    if (!answer.ok) return;
    const text = await answer.text();
    if (text === ctx.lastAnswer) return;
    ctx.lastAnswer = text;
    ctx.runs = JSON.parse(text).runs;
    for (const view of views) view.update?.();
  } catch {
    // The server has ended: the page keeps what it shows.
  }
}

main().catch((error) => clear(app, el("p", { role: "alert" }, `This page could not be shown: ${error.message}`)));
