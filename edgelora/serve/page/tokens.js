// An answer as tokens that tell what else each of them could have been.

import { el } from "./elements.js";

/**
 * Reads pieces of a reply as tokens: [{ text, entry }]; entry is OpenAI's { token, logprob, top_logprobs }, or null.
 *
 * The texts are always exactly the reply's: where a piece is not the text of the tokens that came with it (a character
 * of several tokens, or text that was held back), it becomes one token with the first entry.
 */
export class TokenReader {
  constructor() {
    this.waiting = [];
  }

  push(piece, entries) {
    const all = [...this.waiting, ...entries];
    this.waiting = [];
    if (piece === "") this.waiting = all;
    if (piece === "") return [];
    if (all.length && all.map(({ token }) => token).join("") === piece) {
      return all.filter(({ token }) => token).map((entry) => ({ text: entry.token, entry }));
    }
    return [{ text: piece, entry: all[0] ?? null }];
  }
}

/** The text of one answer. A single stop of the Tab key; the arrow keys go from token to token. */
export class TokenText {
  constructor(name, choices) {
    this.tokens = [];
    this.choices = choices;
    this.element = el("div", { class: "text tokens", tabindex: "0", role: "group", "aria-label": `Answer of ${name}` });
    this.element.addEventListener("pointerover", (event) => this.#point(event));
    this.element.addEventListener("click", (event) => this.#point(event));
    this.element.addEventListener("pointerleave", () => this.choices.hide());
    this.element.addEventListener("blur", () => this.#leave());
    this.element.addEventListener("keydown", (event) => this.#key(event));
    this.at = null;
  }

  get texts() {
    return this.tokens.map(({ text }) => text);
  }

  get text() {
    return this.texts.join("");
  }

  append(tokens) {
    for (const token of tokens) {
      const span = el("span", { "data-at": this.tokens.length }, token.text);
      this.tokens.push({ ...token, span });
      this.element.append(span);
    }
  }

  /** Marks the tokens that are not shared, and the first at which the answers part. */
  mark(shared, parts) {
    this.tokens.forEach(({ span }, at) => {
      span.classList.toggle("differs", !shared[at]);
      span.classList.toggle("parts", at === parts);
    });
  }

  #point(event) {
    const at = event.target.dataset?.at;
    if (at !== undefined) this.choices.show(this.tokens[at]);
  }

  #leave() {
    this.#moveTo(null);
    this.choices.hide();
  }

  #key(event) {
    const last = this.tokens.length - 1;
    const from = this.at ?? -1;
    const marked = this.tokens.flatMap(({ span }, at) => (isMarkStart(span) ? [at] : []));
    const to = {
      ArrowRight: () => Math.min(from + 1, last),
      ArrowLeft: () => Math.max(from - 1, 0),
      ArrowDown: () => marked.find((at) => at > from) ?? this.at,
      ArrowUp: () => marked.findLast((at) => at < from) ?? this.at,
      Home: () => 0,
      End: () => last,
    }[event.key];
    if (!to || last < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.#moveTo(to());
    if (this.at !== null) this.choices.show(this.tokens[this.at], true);
  }

  #moveTo(at) {
    if (this.at !== null) this.tokens[this.at].span.classList.remove("at");
    this.at = at;
    if (at === null) return;
    this.tokens[at].span.classList.add("at");
    this.tokens[at].span.scrollIntoView({ block: "nearest" });
  }
}

/** Whether a run of marked tokens begins here. */
function isMarkStart(span) {
  return span.classList.contains("differs") && !span.previousElementSibling?.classList.contains("differs");
}

/** The small card beside a token: what could have stood there, and how likely. */
export class Choices {
  constructor(element, speech) {
    this.element = element;
    this.speech = speech;
    this.span = null;
    document.addEventListener("scroll", () => this.isShown && this.#place(), { capture: true, passive: true });
  }

  get isShown() {
    return !this.element.hidden;
  }

  hide() {
    this.element.hidden = true;
  }

  show({ entry, span }, aloud = false) {
    const rows = entry ? candidates(entry) : [];
    const lines = rows.map(({ token, probability, isChosen }) => line(token, probability, isChosen));
    const rest = 1 - rows.reduce((sum, { probability }) => sum + probability, 0);
    if (rows.length && rest > 0.0005) lines.push(line(null, rest, false));
    if (!lines.length) lines.push(el("p", {}, "The server sent no probabilities for this."));
    this.element.replaceChildren(...lines);
    this.element.hidden = false;
    this.span = span;
    this.#place();
    if (aloud) this.speech.say(rows.map((row) => `${row.token} ${percent(row.probability)}`).join(", "));
  }

  #place() {
    const margin = 8;
    const token = this.span.getClientRects()[0] ?? this.span.getBoundingClientRect();
    const { width, height } = this.element.getBoundingClientRect();
    const left = Math.max(margin, Math.min(token.left, window.innerWidth - width - margin));
    const below = token.bottom + 6;
    const top = below + height > window.innerHeight ? Math.max(margin, token.top - height - 6) : below;
    this.element.style.left = `${left}px`; // through the object model, which a content security policy lets pass
    this.element.style.top = `${top}px`;
  }
}

/** The likeliest first; the chosen token is among them even where it was not among the likeliest. */
function candidates(entry) {
  const all = entry.top_logprobs ?? [];
  const rows = all.some(({ token }) => token === entry.token) ? all : [...all, entry];
  return rows
    .map(({ token, logprob }) => ({ token, probability: Math.exp(logprob), isChosen: token === entry.token }))
    .sort((a, b) => b.probability - a.probability);
}

function line(token, probability, isChosen) {
  const bar = el("span", { class: "bar" });
  bar.style.width = `${(probability * 100).toFixed(2)}%`;
  const name = token === null ? el("span", { class: "soft" }, "all others") : el("code", {}, visible(token));
  const figure = el("b", {}, percent(probability));
  return el("p", { class: isChosen ? "chosen" : null }, name, el("span", { class: "bars" }, bar), figure);
}

function percent(probability) {
  if (probability > 0 && probability < 0.001) return "< 0.1 %";
  return `${(probability * 100).toFixed(1)} %`;
}

/** A token with its spaces and line ends to be seen. */
function visible(token) {
  return token === "" ? "(end)" : token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}
