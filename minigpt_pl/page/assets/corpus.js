// What the training text says without a model: the next character after the last few ones, and copied spans.

// Interpolated n-gram probabilities (Witten-Bell, as minigpt_pl/data/baselines.py) of the character after `context`.
export function ngram(train, context, order, alphabetSize) {
  let probability = new Map(), rest = 1 / alphabetSize;  // `rest` is what every character has that is not in the map
  for (let length = 0; length < order; length++) {
    if (length > context.length) break;
    const counts = followers(train, length ? context.slice(-length).join("") : "");
    const n = counts.total, t = counts.map.size;
    if (!n) break;
    const next = new Map();
    for (const key of new Set([...probability.keys(), ...counts.map.keys()])) {
      next.set(key, ((counts.map.get(key) ?? 0) + t * (probability.get(key) ?? rest)) / (n + t));
    }
    rest = (t * rest) / (n + t);
    probability = next;
  }
  return { probability, rest };
}

const unigrams = new Map();

function followers(train, context) {
  if (!context && unigrams.has(train)) return unigrams.get(train);
  const map = new Map();
  let total = 0;
  for (let at = train.indexOf(context); at >= 0 && at + context.length < train.length; at = train.indexOf(context, at + 1)) {
    const character = String.fromCodePoint(train.codePointAt(at + context.length));
    if (character >= "\udc00" && character <= "\udfff") continue;  // the second half of a character
    map.set(character, (map.get(character) ?? 0) + 1);
    total++;
  }
  const result = { map, total };
  if (!context) unigrams.set(train, result);
  return result;
}

// For each UTF-16 unit of a text, whether it lies in a span of at least `length` units that stands in `train`.
export class CopyFinder {
  constructor(train, length) {
    this.length = length;
    this.known = new Set();
    for (let at = 0; at + length <= train.length; at++) this.known.add(train.substr(at, length));
  }

  find(text) {
    const copied = new Uint8Array(text.length);
    for (let at = 0; at + this.length <= text.length; at++) {
      if (this.known.has(text.substr(at, this.length))) copied.fill(1, at, at + this.length);
    }
    return copied;
  }
}
