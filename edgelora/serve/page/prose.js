// A reply as it is written: text, and what stands between fences (```) as blocks of code. All of it is text nodes.

import { el } from "./elements.js";

const FENCE = /^ {0,3}```[^`\n]*\n?$/;
const MAY_BECOME_FENCE = /^ {0,3}(`{0,2}|```[^`\n]*)$/;

export class Prose {
  constructor(element) {
    this.element = element;
    this.held = ""; // a line's beginning that may yet become a fence; null in the middle of another line
    this.isCode = false;
    this.written = null; // the text node that goes on
  }

  append(piece) {
    for (const part of piece.split(/(?<=\n)/)) this.#push(part);
  }

  /** The last piece: shows also what was held back. */
  finish(piece = "") {
    this.append(piece);
    if (this.held) this.#line(this.held);
    this.held = null;
  }

  #push(part) {
    const isWhole = part.endsWith("\n");
    if (this.held === null) this.#write(part);
    else {
      const line = this.held + part;
      if (!isWhole && MAY_BECOME_FENCE.test(line)) {
        this.held = line;
        return;
      }
      this.#line(line);
    }
    this.held = isWhole ? "" : null;
  }

  #line(line) {
    if (!FENCE.test(line)) return this.#write(line);
    this.isCode = !this.isCode;
    this.written = null;
  }

  #write(text) {
    this.written ??= this.#block().appendChild(document.createTextNode(""));
    this.written.appendData(text);
  }

  #block() {
    if (!this.isCode) return this.element;
    const code = el("code");
    this.element.append(el("pre", { tabindex: "0", role: "group", "aria-label": "Code" }, code));
    return code;
  }
}
