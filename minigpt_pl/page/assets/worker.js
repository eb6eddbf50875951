// The worker: answers the page's questions one after another, so that the page itself never waits for a product.
import { CopyFinder, ngram } from "./corpus.js";
import { largest, softmaxInPlace } from "./layers.js";
import { Cache, Model, newTrace } from "./model.js";
import { generate, uniforms } from "./sampling.js";
import { namedTensors } from "./weights.js";

const SHOWN = 10;  // likeliest tokens that are kept for a position
const COPIED_LENGTH = 20;
const SLICE_MS = 40;  // generation looks for other messages after each slice
const models = [];
let train = "", alphabetSize = 1, copyFinder = null, generation = 0, writing = 0, traced = null;

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function likeliest(logits, target) {
  const probabilities = Float32Array.from(logits);
  softmaxInPlace(probabilities);
  const top = largest(probabilities, Math.min(SHOWN, probabilities.length));
  let entropy = 0, rank = 1;
  for (const p of probabilities) {
    if (p > 0) entropy -= p * Math.log(p);
    if (p > probabilities[target]) rank++;
  }
  const probability = probabilities[target];
  return { top: top.map((id) => [id, probabilities[id]]), entropy, rank, nats: -Math.log(Math.max(probability, 1e-38)) };
}

const answers = {
  addModel({ spec, shapes, weights }) {
    models.push(new Model(spec, namedTensors(weights, shapes)));
  },

  setTrainingText({ text, characters }) {
    train = text;
    alphabetSize = characters;
    copyFinder = null;
  },

  // One window: how the model predicted each of its targets, and which experts read each input.
  async read({ model, ids, targets }) {
    while (writing) await pause(SLICE_MS);  // a user waits for the text that is written
    const net = models[model];
    net.takeRoutes();
    const x = net.read(ids, new Cache(net.spec));
    const predictions = targets.map((target, t) => likeliest(net.logits(x, t), target));
    return { predictions, routes: net.takeRoutes().map(({ chosen, weights }) => ({ chosen, weights })) };
  },

  logits({ model, ids }) {
    const net = models[model];
    const x = net.read(ids, new Cache(net.spec));
    net.takeRoutes();
    return ids.map((_, t) => net.logits(x, t));
  },

  // What happened inside when the model predicted what follows ids[row]. The window is read once for all its rows.
  trace({ model, ids, row }) {
    const net = models[model], key = `${model}:${ids.join()}`;
    if (traced?.key !== key) {
      traced = { key, cache: new Cache(net.spec) };
      net.read(ids, traced.cache);
    }
    const trace = newTrace();
    traced.cache.length = row;
    net.read([ids[row]], traced.cache, trace);
    net.takeRoutes();
    const lens = trace.residuals.map((x) => likeliest(net.logits(x, 0), 0).top);
    return { attention: trace.attention, router: trace.router, taps: trace.taps, lens };
  },

  ngram({ context, order, target }) {
    const { probability, rest } = ngram(train, context, order, alphabetSize);
    const top = [...probability].sort((a, b) => b[1] - a[1]).slice(0, SHOWN);
    return { top, nats: -Math.log(probability.get(target) ?? rest) };
  },

  copied({ text }) {
    copyFinder ??= new CopyFinder(train, COPIED_LENGTH);
    return copyFinder.find(text);
  },

  async generate({ model, prompt, sampling, draws, count, skip = 0 }, id) {
    const mine = ++generation, source = draws ? draws.values() : uniforms(sampling.seed);
    for (let i = 0; i < skip; i++) source.next();
    const stream = generate(models[model], prompt, sampling, source), began = performance.now();
    let done = 0;
    writing++;
    try {
      while (done < count && mine === generation) {
        const batch = [], start = performance.now();
        while (done < count && performance.now() - start < SLICE_MS) {
          const { id: token, logits } = stream.next().value;
          batch.push({ id: token, ...likeliest(logits, token) });
          done++;
        }
        postMessage({ id, part: batch });
        await pause(0);
      }
    } finally {
      writing--;
    }
    return { tokensPerSecond: (1000 * done) / (performance.now() - began), stopped: mine !== generation };
  },

  stop() {
    generation++;
  },
};

self.onmessage = async ({ data: { id, question, content } }) => {
  try {
    postMessage({ id, answer: await answers[question](content, id) });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
};
