// The layers of a model on Float32Array, row by row: products, norms, activations, rotary positions.
// How a model puts them together is in model.js.

// y (T, O) = x (T, I) times the transposed matrix w (O, I), plus the bias. Tiles of four rows and two outputs share
// what they read. (Sums in float32, by Math.fround, would be slower.)
export function linear(x, T, I, w, O, bias, y) {
  const tiled = T - (T % 4), even = O - (O % 2);
  for (let t = 0; t < tiled; t += 4) {
    const x0 = t * I, x1 = x0 + I, x2 = x1 + I, x3 = x2 + I;
    const y0 = t * O, y1 = y0 + O, y2 = y1 + O, y3 = y2 + O;
    for (let o = 0; o < even; o += 2) {
      const u0 = o * I, v0 = u0 + I;
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
      for (let i = 0; i < I; i++) {
        const u = w[u0 + i], v = w[v0 + i];
        const p = x[x0 + i], q = x[x1 + i], r = x[x2 + i], s = x[x3 + i];
        a0 += p * u;
        a1 += q * u;
        a2 += r * u;
        a3 += s * u;
        b0 += p * v;
        b1 += q * v;
        b2 += r * v;
        b3 += s * v;
      }
      y[y0 + o] = a0;
      y[y1 + o] = a1;
      y[y2 + o] = a2;
      y[y3 + o] = a3;
      y[y0 + o + 1] = b0;
      y[y1 + o + 1] = b1;
      y[y2 + o + 1] = b2;
      y[y3 + o + 1] = b3;
    }
    if (even < O) for (let row = t; row < t + 4; row++) linearRow(x, row, I, w, O, even, y);
  }
  for (let t = tiled; t < T; t++) linearRow(x, t, I, w, O, 0, y);
  if (bias) for (let t = 0; t < T; t++) for (let o = 0; o < O; o++) y[t * O + o] += bias[o];
}

// One row, from output `first` on: four outputs share each input that is read.
function linearRow(x, t, I, w, O, first, y) {
  const xAt = t * I, yAt = t * O;
  let o = first;
  for (; o + 4 <= O; o += 4) {
    const w0 = o * I, w1 = w0 + I, w2 = w1 + I, w3 = w2 + I;
    let a0 = 0, a1 = 0, a2 = 0, a3 = 0;
    for (let i = 0; i < I; i++) {
      const value = x[xAt + i];
      a0 += value * w[w0 + i];
      a1 += value * w[w1 + i];
      a2 += value * w[w2 + i];
      a3 += value * w[w3 + i];
    }
    y[yAt + o] = a0;
    y[yAt + o + 1] = a1;
    y[yAt + o + 2] = a2;
    y[yAt + o + 3] = a3;
  }
  for (; o < O; o++) {
    let a = 0;
    for (let i = 0; i < I; i++) a += x[xAt + i] * w[o * I + i];
    y[yAt + o] = a;
  }
}

// One head at one position: scores of the query q[qAt] with the first `count` keys, which become weights; then the
// weighted sum of the values goes to y[yAt]. Keys and values of a position stand C apart, D belong to this head.
export function attendHead(q, qAt, keys, values, headAt, C, D, count, scores, y, yAt) {
  const scale = 1 / Math.sqrt(D);
  for (let j = 0; j < count; j++) {
    const k = j * C + headAt;
    let score = 0;
    for (let d = 0; d < D; d++) score += q[qAt + d] * keys[k + d];
    scores[j] = score * scale;
  }
  softmaxInPlace(scores, 0, count);
  let d = 0;
  for (; d + 4 <= D; d += 4) {
    let a0 = 0, a1 = 0, a2 = 0, a3 = 0;
    for (let j = 0, v = headAt + d; j < count; j++, v += C) {
      const weight = scores[j];
      a0 += weight * values[v];
      a1 += weight * values[v + 1];
      a2 += weight * values[v + 2];
      a3 += weight * values[v + 3];
    }
    y[yAt + d] = a0;
    y[yAt + d + 1] = a1;
    y[yAt + d + 2] = a2;
    y[yAt + d + 3] = a3;
  }
  for (; d < D; d++) {
    let a = 0;
    for (let j = 0; j < count; j++) a += scores[j] * values[j * C + headAt + d];
    y[yAt + d] = a;
  }
}

// LayerNorm with a bias, RMSNorm without one; x and y (T, C).
export function norm(kind, x, T, C, weight, bias, eps, y) {
  for (let t = 0; t < T; t++) {
    const at = t * C;
    let mean = 0, square = 0;
    if (kind === "layer") {
      for (let c = 0; c < C; c++) mean += x[at + c];
      mean /= C;
    }
    for (let c = 0; c < C; c++) square += (x[at + c] - mean) ** 2;
    const scale = 1 / Math.sqrt(square / C + eps);
    for (let c = 0; c < C; c++) y[at + c] = (x[at + c] - mean) * scale * weight[c] + (bias ? bias[c] : 0);
  }
}

// Divides each of the H heads of width D that begin at x[at] by its root mean square, and multiplies by a gain.
export function unitHeads(x, at, H, D, eps, gain) {
  for (let h = 0; h < H; h++) {
    const head = at + h * D;
    let square = 0;
    for (let d = 0; d < D; d++) square += x[head + d] ** 2;
    const scale = gain / Math.sqrt(square / D + eps);
    for (let d = 0; d < D; d++) x[head + d] *= scale;
  }
}

// Error function by Abramowitz & Stegun 7.1.26; its error is below 2e-7.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - poly * Math.exp(-x * x));
}

export function geluInPlace(x, approximation) {
  for (let i = 0; i < x.length; i++) {
    const v = x[i];
    const inner = approximation === "tanh"
      ? Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v * v * v)) : erf(v / Math.SQRT2);
    x[i] = 0.5 * v * (1 + inner);
  }
}

// silu(gate) * up of (T, 2 F), gate first -> (T, F).
export function swiglu(gateUp, T, F, y) {
  for (let t = 0; t < T; t++) {
    for (let f = 0; f < F; f++) {
      const gate = gateUp[t * 2 * F + f];
      y[t * F + f] = (gate / (1 + Math.exp(-gate))) * gateUp[t * 2 * F + F + f];
    }
  }
}

// Cosines and sines (positions, D / 2), rounded as float32 computes them.
export function rotaryTables(positions, D, theta) {
  const cos = new Float32Array((positions * D) / 2), sin = new Float32Array((positions * D) / 2);
  for (let p = 0; p < positions; p++) {
    for (let i = 0; i < D / 2; i++) {
      const angle = Math.fround(p * Math.fround(theta ** ((-2 * i) / D)));
      cos[(p * D) / 2 + i] = Math.cos(angle);
      sin[(p * D) / 2 + i] = Math.sin(angle);
    }
  }
  return { cos, sin };
}

// Rotates the H heads of width D that begin at x[at], for one position, in the half-split layout.
export function rotate(x, at, H, D, tables, position) {
  const half = D / 2, row = position * half;
  for (let h = 0; h < H; h++) {
    const head = at + h * D;
    for (let i = 0; i < half; i++) {
      const a = x[head + i], b = x[head + half + i];
      const cos = tables.cos[row + i], sin = tables.sin[row + i];
      x[head + i] = a * cos - b * sin;
      x[head + half + i] = b * cos + a * sin;
    }
  }
}

export function softmaxInPlace(x, start = 0, end = x.length) {
  let max = -Infinity, sum = 0;
  for (let i = start; i < end; i++) max = Math.max(max, x[i]);
  for (let i = start; i < end; i++) sum += x[i] = Math.exp(x[i] - max);
  for (let i = start; i < end; i++) x[i] /= sum;
}

// Indices of the k largest values of x[start, end), the largest first; of equal values the first.
export function largest(x, k, start = 0, end = x.length) {
  const best = [];
  for (let i = start; i < end; i++) {
    if (best.length === k && !(x[i] > x[start + best[k - 1]])) continue;
    let at = best.length < k ? best.length : k - 1;
    for (; at > 0 && x[i] > x[start + best[at - 1]]; at--) best[at] = best[at - 1];
    best[at] = i - start;
  }
  return best;
}
