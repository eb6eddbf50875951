// Text to token ids and back, for characters and for byte pairs. The reference is minigpt_pl/data/tokenizer.py.

export class Tokenizer {
  constructor({ vocabulary, merges, max_line }) {
    this.vocabulary = vocabulary;
    this.ids = new Map(vocabulary.map((token, id) => [token, id]));
    this.ranks = new Map();  // of a pair of ids, as one number: [rank, id of the merged token]
    for (const [rank, [left, right]] of (merges ?? []).entries()) {
      const pair = this.ids.get(left) * vocabulary.length + this.ids.get(right);
      if (!this.ranks.has(pair)) this.ranks.set(pair, [rank, this.ids.get(left + right)]);
    }
    this.maxLine = max_line;
  }

  decode(ids) {
    return ids.map((id) => this.vocabulary[id]).join("");
  }

  // Ids of the known characters of a text, and the set of its unknown characters, which are left out.
  encode(text) {
    const known = [], unknown = new Set();
    for (const character of text) {
      const id = this.ids.get(character);
      id === undefined ? unknown.add(character) : known.push(id);
    }
    if (!this.ranks.size) return { ids: known, unknown };
    return { ids: this.lines(known).flatMap((line) => this.merge(line)), unknown };
  }

  // Merges happen within a line with its newline, and within max_line characters of it.
  lines(ids) {
    if (this.maxLine == null) return [ids];
    const lines = [];
    let line = [];
    for (const id of ids) {
      line.push(id);
      if (this.vocabulary[id] === "\n" || line.length === this.maxLine) {
        lines.push(line);
        line = [];
      }
    }
    return [...lines, line];
  }

  // The pair that was learned first is merged first, and of equal pairs the leftmost one.
  merge(ids) {
    const V = this.vocabulary.length;
    ids = [...ids];
    for (;;) {
      let best = null, at = -1;
      for (let i = 0; i + 1 < ids.length; i++) {
        const found = this.ranks.get(ids[i] * V + ids[i + 1]);
        if (found && (!best || found[0] < best[0])) [best, at] = [found, i];
      }
      if (!best) return ids;
      ids.splice(at, 2, best[1]);
    }
  }
}
