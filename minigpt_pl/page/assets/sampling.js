// Continues token ids, one token at a time. The reference is minigpt_pl/generation/generate.py.
import { largest, softmaxInPlace } from "./layers.js";
import { Cache } from "./model.js";

// The next token from logits (V,) and one number in [0, 1).
export function sampleToken(logits, uniform, { temperature, top_k, top_p }) {
  if (temperature === 0) return largest(logits, 1)[0];
  const max = logits.reduce((a, b) => Math.max(a, b));
  let probabilities = Float64Array.from(logits, (logit) => (logit - max) / temperature);
  softmaxInPlace(probabilities);
  let order = null;
  if ((top_k > 0 && top_k < logits.length) || top_p < 1) {
    order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a] || a - b);
    if (top_k > 0) order = order.slice(0, top_k);
    let before = 0;
    probabilities = order.map((id) => {
      const kept = before < top_p ? probabilities[id] : 0;  // the most likely one always stays
      before += probabilities[id];
      return kept;
    });
  }
  const total = probabilities.reduce((a, b) => a + b);
  let index = 0;
  for (let sum = probabilities[0]; index < probabilities.length - 1 && sum <= uniform * total; sum += probabilities[index]) index++;
  return order ? order[index] : index;
}

// Numbers in [0, 1) from a seed (sfc32 by Chris Doty-Humphrey), with 24 bits each.
export function* uniforms(seed) {
  let a = seed | 0, b = Math.floor(seed / 2 ** 32) | 0, c = 0x9e3779b9 | 0, d = 1;
  for (let i = 0; ; i++) {
    const t = (((a + b) | 0) + d) | 0;
    d = (d + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + t) | 0;
    if (i >= 12) yield (t >>> 8) / 2 ** 24;  // the first numbers still resemble the seed
  }
}

// Yields {id, logits} for ever. When the window is full, its last half is read again, as in the reference.
export function* generate(model, prompt, sampling, draws) {
  const size = model.spec.block_size, cache = new Cache(model.spec);
  let window = prompt.slice(-size), x = model.read(window, cache), row = window.length - 1;
  for (;;) {
    const logits = model.logits(x, row);
    model.takeRoutes();
    const id = sampleToken(logits, draws.next().value, sampling);
    yield { id, logits };
    window.push(id);
    if (window.length > size) {
      window = window.slice(-Math.max(1, size >> 1));
      cache.length = 0;
      x = model.read(window, cache);
      row = window.length - 1;
    } else {
      x = model.read([id], cache);
      row = 0;
    }
  }
}
