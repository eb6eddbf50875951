// Colours that colour-blind people can tell apart (Okabe & Ito), as background of text and as lines, and legends.
// The numbers are in style.css, where they differ between light and dark.
import { el } from "./dom.js";

const STRONGEST = 0.8;  // alpha; the text on it must stay readable
export const MAX_NATS = 6;
export const HUES = 8;

export function tint(hue, strength) {
  return `rgb(var(--${hue}) / ${(STRONGEST * Math.min(1, Math.max(0, strength))).toFixed(3)})`;
}

export function expertHue(expert) {
  return `hue-${expert % HUES}`;
}

export function lineColor(index) {
  return `rgb(var(--hue-${index % HUES}))`;
}

// Above 0 the second model was more surprised.
export function differenceTint(nats) {
  return tint(nats > 0 ? "first" : "second", Math.abs(nats) / 2);
}

export function scaleLegend(hue, low, high) {
  const steps = Array.from({ length: 8 }, (_, i) => swatch(tint(hue, i / 7)));
  return el("span", { class: "legend" }, low, " ", steps, " ", high);
}

export function keyLegend(entries) {
  return el("span", { class: "legend" }, entries.map(([color, name]) => el("span", {}, swatch(color), " ", name)));
}

function swatch(color) {
  const box = el("i", { class: "swatch" });
  box.style.backgroundColor = color;
  return box;
}
