// What a screen reader says: whole sentences as they are complete, rather than each token as it comes.

import { el } from "./elements.js";

const SENTENCE_END = /[.!?…:。！？]["'”’)\]]*\s|\n/g;
const MOST_KEPT = 40;

export class Speech {
  constructor(element) {
    this.element = element;
    this.waiting = "";
  }

  /** Says something at once. */
  say(text) {
    if (!text.trim()) return;
    this.element.append(el("p", {}, text.trim()));
    while (this.element.childElementCount > MOST_KEPT) this.element.firstElementChild.remove();
  }

  /** A piece of a reply: said with its sentence. */
  push(piece) {
    this.waiting += piece;
    const last = [...this.waiting.matchAll(SENTENCE_END)].at(-1);
    if (!last) return;
    const end = last.index + last[0].length;
    this.say(this.waiting.slice(0, end));
    this.waiting = this.waiting.slice(end);
  }

  /** The end of a reply: what is left of it, and how it ended. */
  end(note) {
    this.say(this.waiting);
    this.waiting = "";
    this.say(note);
  }
}
