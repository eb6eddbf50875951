// The forward pass of every kind of model, with a cache of keys and values; it knows ids, not text.
// The layers are in layers.js. The reference is minigpt_pl/models; tests/page compares the two.
import { attendHead, geluInPlace, largest, linear, norm, rotaryTables, rotate, softmaxInPlace } from "./layers.js";
import { swiglu, unitHeads } from "./layers.js";

// What the layers have computed for the positions of a window: keys, values, and the inputs of short convolutions.
export class Cache {
  constructor(spec) {
    const size = spec.block_size * spec.n_embd;
    this.length = 0;
    this.layers = spec.blocks.map((block) => ({
      keys: new Float32Array(size),
      values: new Float32Array(size),
      conv_1: block.conv_1 ? new Float32Array(size) : null,
      conv_2: block.conv_2 ? new Float32Array(size) : null,
    }));
  }
}

export class Model {
  constructor(spec, tensors) {
    this.spec = spec;
    this.tensors = tensors;
    this.headWeight = tensors[spec.tied ? "token_embedding.weight" : "head.weight"];
    this.rotary = spec.rope_theta ? rotaryTables(spec.block_size, spec.n_embd / spec.n_head, spec.rope_theta) : null;
  }

  // Reads T ids after the positions that the cache holds; returns the residual stream (T, C) behind the last block.
  // A trace, if given, collects what happened at the last position: see newTrace.
  read(ids, cache, trace = null) {
    const { n_embd: C, block_size, blocks } = this.spec;
    const T = ids.length, first = cache.length;
    if (first + T > block_size) throw new Error(`${first + T} positions, but block_size is ${block_size}`);
    const x = new Float32Array(T * C);
    const tokens = this.tensors["token_embedding.weight"], positions = this.tensors["position_embedding.weight"];
    for (let t = 0; t < T; t++) {
      for (let c = 0; c < C; c++) {
        x[t * C + c] = tokens[ids[t] * C + c] + (positions ? positions[(first + t) * C + c] : 0);
      }
    }
    for (let layer = 0; layer < blocks.length; layer++) this.block(x, T, layer, cache, trace);
    cache.length = first + T;
    return x;
  }

  // Logits (V,) of row t of the residual stream: also of a stream between two blocks (the "logit lens").
  logits(x, t) {
    const { n_embd: C, vocab_size: V } = this.spec;
    const normed = new Float32Array(C), y = new Float32Array(V);
    this.norm("norm", x.subarray(t * C, (t + 1) * C), 1, normed, this.spec.norm);
    linear(normed, 1, C, this.headWeight, V, this.tensors["head.bias"], y);
    return y;
  }

  norm(name, x, T, y, { kind, eps }) {
    const weight = this.tensors[`${name}.weight`], bias = this.tensors[`${name}.bias`];
    norm(kind, x, T, this.spec.n_embd, weight, bias, eps, y);
  }

  linear(name, x, T, I, O) {
    const y = new Float32Array(T * O);
    linear(x, T, I, this.tensors[`${name}.weight`], O, this.tensors[`${name}.bias`], y);
    return y;
  }

  block(x, T, layer, cache, trace) {
    const C = this.spec.n_embd, block = this.spec.blocks[layer], name = `blocks.${layer}`;
    let y = new Float32Array(T * C);
    if (block.norm_1) { // a block without it has no attention
      this.norm(`${name}.norm_1`, x, T, y, block.norm_1);
      if (block.conv_1) y = this.convolution(`${name}.conv_1`, y, T, cache.layers[layer].conv_1, cache.length, trace);
      y = this.attention(`${name}.attention`, y, T, cache.layers[layer], cache.length, trace);
      for (let i = 0; i < x.length; i++) x[i] += y[i];
      y = new Float32Array(T * C);
    } else if (trace) trace.attention.push([]);
    this.norm(`${name}.norm_2`, x, T, y, block.norm_2);
    if (block.conv_2) y = this.convolution(`${name}.conv_2`, y, T, cache.layers[layer].conv_2, cache.length, trace);
    y = this.feedForward(`${name}.feed_forward`, y, T, block.feed_forward, trace);
    for (let i = 0; i < x.length; i++) x[i] += y[i];
    if (trace) trace.residuals.push(x.slice((T - 1) * C));
  }

  // x plus a weighted sum of its last K positions, channel by channel.
  convolution(name, x, T, inputs, first, trace) {
    const C = this.spec.n_embd, w = this.tensors[`${name}.weight`], K = w.length / C;
    inputs.set(x, first * C);
    const y = new Float32Array(T * C), strengths = new Float64Array(K);
    for (let t = 0; t < T; t++) {
      for (let back = 0; back < K && back <= first + t; back++) {
        const from = (first + t - back) * C;
        let square = 0;
        for (let c = 0; c < C; c++) {
          const part = inputs[from + c] * (w[back * C + c] + (back === 0 ? 1 : 0));
          y[t * C + c] += part;
          square += part * part;
        }
        if (t === T - 1) strengths[back] = Math.sqrt(square);
      }
    }
    if (trace) trace.taps.push({ name, strengths: [...strengths] });
    return y;
  }

  attention(name, x, T, layer, first, trace) {
    const { n_embd: C, n_head: H, qk_norm_eps: eps } = this.spec, D = C / H;
    const qkv = this.linear(`${name}.qkv`, x, T, C, 3 * C);
    const mixed = new Float32Array(T * C), scores = new Float32Array(first + T), heads = [];
    for (let t = 0; t < T; t++) {
      const at = t * 3 * C, position = first + t;
      if (this.rotary) for (const part of [at, at + C]) rotate(qkv, part, H, D, this.rotary, position);
      if (eps) unitHeads(qkv, at, 2 * H, D, eps, this.tensors[`${name}.qk_gain`][0]);
      layer.keys.set(qkv.subarray(at + C, at + 2 * C), position * C);
      layer.values.set(qkv.subarray(at + 2 * C, at + 3 * C), position * C);
      for (let h = 0; h < H; h++) {
        attendHead(qkv, at + h * D, layer.keys, layer.values, h * D, C, D, position + 1, scores, mixed, t * C + h * D);
        if (trace && t === T - 1) heads.push(scores.slice(0, position + 1));
      }
    }
    if (trace) trace.attention.push(heads);
    return this.linear(`${name}.out`, mixed, T, C, C);
  }

  feedForward(name, x, T, spec, trace) {
    const C = this.spec.n_embd;
    if (spec.kind === "moe") return this.experts(name, x, T, spec, trace);
    if (spec.kind === "mlp") {
      const hidden = this.linear(`${name}.up`, x, T, C, spec.hidden);
      geluInPlace(hidden, spec.gelu);
      return this.linear(`${name}.down`, hidden, T, spec.hidden, C);
    }
    const hidden = new Float32Array(T * spec.hidden);
    swiglu(this.linear(`${name}.gate_up`, x, T, C, 2 * spec.hidden), T, spec.hidden, hidden);
    return this.linear(`${name}.down`, hidden, T, spec.hidden, C);
  }

  // A mixture of experts: each computes the rows that chose it, all at once.
  experts(name, x, T, { hidden: F, n_experts: E, top_k, gate }, trace) {
    const C = this.spec.n_embd, y = new Float32Array(T * C);
    const routing = this.linear(`${name}.router`, x, T, C, E);
    const rowsOf = Array.from({ length: E }, () => []);
    this.routes ??= [];
    const route = { probabilities: routing, chosen: new Uint16Array(T * top_k), weights: new Float32Array(T * top_k) };
    for (let t = 0; t < T; t++) {
      const chosen = largest(routing, top_k, t * E, (t + 1) * E);
      const logits = Float64Array.from(chosen, (e) => routing[t * E + e]);
      softmaxInPlace(routing, t * E, (t + 1) * E);
      if (gate === "softmax_selected") softmaxInPlace(logits);
      chosen.forEach((e, k) => {
        const weight = gate === "softmax_selected" ? logits[k] : routing[t * E + e];
        rowsOf[e].push([t, weight]);
        route.chosen[t * top_k + k] = e;
        route.weights[t * top_k + k] = weight;
      });
    }
    rowsOf.forEach((rows, e) => {
      if (!rows.length) return;
      const n = rows.length, input = new Float32Array(n * C), gateUp = new Float32Array(n * 2 * F);
      const inner = new Float32Array(n * F), output = new Float32Array(n * C);
      rows.forEach(([t], i) => input.set(x.subarray(t * C, (t + 1) * C), i * C));
      const up = this.tensors[`${name}.gate_up`].subarray(e * 2 * F * C, (e + 1) * 2 * F * C);
      linear(input, n, C, up, 2 * F, null, gateUp);
      swiglu(gateUp, n, F, inner);
      linear(inner, n, F, this.tensors[`${name}.down`].subarray(e * C * F, (e + 1) * C * F), C, null, output);
      rows.forEach(([t, weight], i) => {
        for (let c = 0; c < C; c++) y[t * C + c] += weight * output[i * C + c];
      });
    });
    this.routes.push(route);
    if (trace) trace.router.push([...routing.subarray((T - 1) * E)]);
    return y;
  }

  // The routing of each layer with experts in the last call of read: probabilities (T, E), chosen and weights (T, k).
  takeRoutes() {
    const routes = this.routes ?? [];
    this.routes = [];
    return routes;
  }
}

// What happened at one position, by layer: attention[layer][head][position], router[layer][expert], taps of each
// convolution, and the residual stream behind each block.
export function newTrace() {
  return { attention: [], router: [], taps: [], residuals: [] };
}
