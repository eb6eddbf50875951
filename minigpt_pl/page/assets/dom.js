// Builds elements. Text is only ever set as text, never as markup: it may be anybody's.

// el("p", { class: "note", onclick: f }, "text", child) -> a <p>
export function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g", "rect", "circle", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null));
  return element;
}

export function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
}

// A labelled <select>; options are [value, text].
export function choice(label, options, onchange) {
  const select = el("select", { onchange: () => onchange(select.value) });
  for (const [value, text] of options) select.append(el("option", { value }, text));
  return { element: el("label", {}, label, " ", select), select };
}

// A labelled number; its value is clipped to [min, max].
export function number(label, value, { min, max, step }) {
  const input = el("input", { type: "number", value, min, max, step });
  const read = () => Math.min(max ?? Infinity, Math.max(min ?? -Infinity, Number(input.value) || 0));
  return { element: el("label", {}, label, " ", input), read };
}

const NAMES = { "\n": "\u21b5", "\t": "\u21e5", " ": "\u2423" };
const HIDDEN = /[\u0080-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/gu;

// A text in which control characters are visible, also those that would turn the direction of what follows.
export function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/gu, (c) => String.fromCodePoint(0x2400 + c.codePointAt(0)))
    .replace(/\u007f/gu, "\u2421")
    .replace(HIDDEN, (c) => `\u27e8U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`);
}

// The name of a token outside of a text, where spaces and line ends must be seen.
export function tokenName(token) {
  return visible(token).replace(/[\n\t ]/gu, (c) => NAMES[c]);
}

export function percent(p) {
  return p >= 0.0995 ? `${(100 * p).toFixed(0)}%` : `${(100 * p).toFixed(1)}%`;
}

export function clear(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child != null));
  return element;
}
