// A text of tokens, each of which can be shaded, pointed at, tapped, and reached with the arrow keys.
import { clear, el, visible } from "./dom.js";

export class TextView {
  // onselect(index) when a token is pointed at or reached by keys; onpin(index) when it is clicked or Enter is pressed.
  constructor(label, { onselect, onpin = () => {} }) {
    this.spans = [];
    this.first = 0;
    this.selected = null;
    this.pinned = false;
    this.onselect = onselect;
    this.onpin = onpin;
    this.element = el("div", {
      class: "text", tabindex: 0, role: "group", "aria-label": `${label}. Arrow keys move, Enter holds the position.`,
      onpointerover: (event) => this.moved(event) && this.pointed(event, false),
      onclick: (event) => this.pointed(event, true),
      onkeydown: (event) => this.key(event),
    });
  }

  setTokens(tokens, first = 0) {
    this.first = first;
    this.spans = [];
    this.selected = null;
    this.pinned = false;
    clear(this.element);
    this.append(tokens);
  }

  append(tokens) {
    for (const token of tokens) {
      const span = el("span", { "data-i": this.first + this.spans.length });
      span.textContent = visible(token).replaceAll("\n", "\u21b5\n");
      this.spans.push(span);
    }
    this.element.append(...this.spans.slice(-tokens.length || this.spans.length));
  }

  paint(index, color, mark = false) {
    const span = this.spans[index - this.first];
    if (!span) return;
    span.style.backgroundColor = color;
    span.classList.toggle("mark", mark);
  }

  select(index, scroll = false) {
    const span = this.spans[index - this.first];
    if (!span) return;
    this.spans[this.selected - this.first]?.classList.remove("selected");
    span.classList.add("selected");
    this.selected = index;
    if (scroll) span.scrollIntoView({ block: "nearest" });
  }

  // Whether the pointer moved: when the text scrolls under it, the keys have moved the position.
  moved({ screenX, screenY }) {
    const moved = screenX !== this.pointer?.screenX || screenY !== this.pointer?.screenY;
    this.pointer = { screenX, screenY };
    return moved;
  }

  pointed(event, clicked) {
    const index = event.target.dataset?.i;
    if (index === undefined || (this.pinned && !clicked)) return;
    if (clicked) {
      this.pinned = !(this.pinned && Number(index) === this.selected);
      this.element.classList.toggle("pinned", this.pinned);
    }
    this.select(Number(index));
    this.onselect(this.selected);
    if (clicked) this.onpin(this.selected);
  }

  key(event) {
    const last = this.first + this.spans.length - 1, now = this.selected ?? this.first - 1;
    const moves = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: this.first, End: last };
    if (event.key === "ArrowDown" || event.key === "ArrowUp") moves[event.key] = this.otherLine(now, event.key === "ArrowDown");
    if (event.key === "Enter") {
      this.onpin(now);
    } else if (event.key in moves) {
      this.select(Math.min(last, Math.max(this.first, moves[event.key])), true);
      this.onselect(this.selected);
    } else {
      return;
    }
    event.preventDefault();
  }

  // The token below or above, nearest to the column of this one.
  otherLine(index, below) {
    const from = this.spans[index - this.first];
    if (!from) return this.first;
    const step = below ? 1 : -1;
    let best = index, line = null, distance = Infinity;
    for (let i = index - this.first + step; i >= 0 && i < this.spans.length; i += step) {
      const span = this.spans[i];
      if (below ? span.offsetTop <= from.offsetTop : span.offsetTop >= from.offsetTop) continue;
      line ??= span.offsetTop;
      if (span.offsetTop !== line) break;
      const far = Math.abs(span.offsetLeft - from.offsetLeft);
      if (far < distance) [best, distance] = [i + this.first, far];
    }
    return best;
  }
}
