// What a model predicted at one token: its likeliest tokens as bars.
import { el, percent, tokenName } from "./dom.js";

// `top` is [[token, probability], ...]; the true token is marked. With onchoose each row is a button.
export function bars(top, truth, onchoose = null) {
  return el("ol", { class: "bars" }, top.map(([token, probability]) => {
    const fill = el("i", { class: "fill" });
    fill.style.width = percent(Math.min(1, probability));
    const name = el("b", {}, tokenName(token));
    const parts = [name, el("span", { class: "track" }, fill), el("small", {}, percent(probability))];
    const isTrue = token === truth;
    const note = isTrue ? el("small", {}, "\u2713") : null;
    return el("li", { class: isTrue ? "true" : "" }, onchoose && !isTrue
      ? el("button", { type: "button", onclick: () => onchoose(token), title: `continue with ${tokenName(token)}` }, parts)
      : [parts, note]);
  }));
}

export function predictionTitle(token, prediction, vocabularySize) {
  const { nats, rank, entropy } = prediction;
  return el("p", {},
    el("b", { class: "token" }, tokenName(token)), ` ${nats.toFixed(2)} nats`,
    el("small", {}, ` \u00b7 rank ${rank} of ${vocabularySize} \u00b7 entropy ${entropy.toFixed(2)}`));
}
