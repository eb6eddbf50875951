// A text that the models read window by window, as an evaluation does, and what they predicted at each token.
// Token i is predicted by row (i - 1) % size of window (i - 1) / size; the first token has no context.

export class Reading {
  constructor(client, models, ids) {
    this.client = client;
    this.models = models;
    this.ids = ids;
    this.predictions = models.map(() => new Array(ids.length));
    this.routes = models.map(() => new Map());  // by window: one {chosen, weights} a layer with experts
    this.done = models.map(() => new Set());
    this.wanted = 0;
    this.ended = false;
    this.onread = () => {};
  }

  size(model) {
    return this.models[model].spec.block_size;
  }

  windowStart(model, index) {
    return Math.floor((index - 1) / this.size(model)) * this.size(model);
  }

  // Reads all windows, those from the token `wanted` on first; `onread(model, first, last)` hears of each.
  async run() {
    for (let next = this.next(); next && !this.ended; next = this.next()) {
      const [model, window] = next, start = window * this.size(model);
      this.done[model].add(window);
      const ids = this.ids.slice(start, start + this.size(model));
      const targets = this.ids.slice(start + 1, start + 1 + this.size(model));
      const { predictions, routes } = await this.client.ask("read", { model, ids, targets });
      if (this.ended) return;
      predictions.forEach((prediction, t) => (this.predictions[model][start + 1 + t] = prediction));
      this.routes[model].set(window, routes);
      this.onread(model, start, start + targets.length);
    }
  }

  next() {
    for (const from of [this.wanted, 0]) {
      let best = null;
      for (let model = 0; model < this.models.length; model++) {
        const windows = Math.ceil((this.ids.length - 1) / this.size(model));
        for (let window = Math.floor(from / this.size(model)); window < windows; window++) {
          if (this.done[model].has(window)) continue;
          const start = window * this.size(model);
          if (!best || start < best[2]) best = [model, window, start];
          break;
        }
      }
      if (best) return best;
    }
    return null;
  }

  // The experts that read token i in a layer with experts: [[expert, weight], ...], the strongest first.
  experts(model, index, layer) {
    const size = this.size(model), routes = this.routes[model].get(Math.floor(index / size));
    if (!routes?.length) return [];
    const { chosen, weights } = routes[layer], k = this.models[model].top_k, at = (index % size) * k;
    if (at + k > chosen.length) return [];
    return Array.from({ length: k }, (_, i) => [chosen[at + i], weights[at + i]]);
  }

  mean(model) {
    let sum = 0, count = 0;
    for (const prediction of this.predictions[model]) {
      if (prediction) {
        sum += prediction.nats;
        count++;
      }
    }
    return { mean: sum / count, count };
  }
}
