// Two or three adapters beside each other on one prompt.

import { atEnd, button, el } from "./elements.js";
import { compare } from "./diff.js";
import { endSays, runReply } from "./reply.js";
import { TokenReader, TokenText } from "./tokens.js";

const ALTERNATIVES = 5;
const LETTERS = ["A", "B", "C"];

export class Compare {
  constructor(api, settings, view, speech, choices, votes, onState) {
    Object.assign(this, { api, settings, view, speech, choices, votes, onState });
    this.running = null;
    this.clear();
  }

  async ask(prompt) {
    if (this.view.querySelector(".empty")) this.view.replaceChildren();
    const controller = (this.running = new AbortController());
    this.onState();
    const trial = new Trial(this, prompt);
    this.view.append(trial.element);
    this.view.scrollTop = this.view.scrollHeight;
    this.speech.say(`${trial.lanes.map(({ choice }) => choice.name).join(" and ")} answer.`);
    await trial.run(controller.signal);
    if (this.running === controller) this.running = null;
    if (trial.hasFailed) trial.end.append(button("Try again", () => this.#again(trial, prompt)));
    if (trial.element.isConnected) this.speech.end(trial.says);
    this.onState();
  }

  /** The same prompt in the trial's stead, with the settings as they are now. */
  async #again(trial, prompt) {
    if (this.running || !this.settings.check()) return;
    trial.element.remove();
    await this.ask(prompt);
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.choices.hide();
    this.view.replaceChildren(
      el(
        "div",
        { class: "empty soft" },
        el("p", {}, "One prompt, two or three adapters. Tokens that only one answer has are marked."),
        el("p", {}, "Point at a token, or go to it with the arrow keys, to see what else it could have been."),
        el("p", {}, "Votes for the better answer stay in this browser until you delete them."),
      ),
    );
  }
}

/** One prompt and its answers. */
class Trial {
  constructor({ api, settings, view, choices, votes }, prompt) {
    Object.assign(this, { api, view, votes, id: crypto.randomUUID?.() ?? String(Math.random()), says: "" });
    this.messages = settings.withSystem([{ role: "user", content: prompt }]);
    // The same seed for all: what differs then comes from the adapters.
    const seed = settings.parameters.seed ?? Math.floor(Math.random() * 2 ** 32);
    this.lanes = settings.choices.map((choice, at) => {
      const body = { ...settings.request(choice, this.messages), seed, logprobs: true, top_logprobs: ALTERNATIVES };
      return new Lane(choice, LETTERS[at], body, choices, () => this.#vote(at));
    });
    this.note = el("span");
    this.end = el("p", { class: "row small soft" }, this.note, el("span", {}, `seed ${seed}`));
    this.element = el(
      "article",
      { class: "trial", "aria-label": "Comparison" },
      el("h2", { class: "unseen" }, "Prompt"),
      el("p", { class: "asked" }, prompt),
      el("div", { class: `columns of-${this.lanes.length}` }, ...this.lanes.map((lane) => lane.element)),
      this.end,
    );
  }

  async run(signal) {
    await Promise.all(this.lanes.map((lane) => lane.run(this.api, signal, (change) => atEnd(this.view, change))));
    const ended = this.lanes.filter((lane) => !lane.hasFailed);
    atEnd(this.view, () => {
      this.#mark(ended);
      if (this.#canVote) this.lanes.forEach((lane) => lane.offerVote());
    });
  }

  get hasFailed() {
    return this.lanes.some((lane) => lane.hasFailed);
  }

  #mark(lanes) {
    if (lanes.length < 2) return;
    const { shared, parts } = compare(lanes.map(({ tokens }) => tokens.texts));
    lanes.forEach(({ tokens }, at) => tokens.mark(shared[at], parts));
    const shares = lanes.map(({ letter }, at) => `${letter} ${percentTrue(shared[at])}`).join(", ");
    const same = "The answers are the same, token for token.";
    this.says = parts === null ? same : `They part at token ${parts + 1}. Shared: ${shares}.`;
    this.note.textContent = this.says;
  }

  /** Only whole answers that differ say anything about which is better. */
  get #canVote() {
    const whole = this.lanes.every((lane) => !lane.hasFailed && lane.end.reason !== "stopped");
    return whole && new Set(this.lanes.map(({ tokens }) => tokens.text)).size > 1;
  }

  #vote(at) {
    const retracts = this.lanes[at].isChosen;
    this.lanes.forEach((lane, place) => (lane.isChosen = place === at && !retracts));
    if (retracts) return this.votes.retract(this.id);
    const answers = this.lanes.map(({ choice: { name, model, scaled, fields }, tokens }) => {
      return { adapter: fields.adapters ? name : model, scale: scaled, text: tokens.text };
    });
    this.votes.cast({ id: this.id, time: new Date().toISOString(), messages: this.messages, answers, chosen: at });
  }
}

/** One answer of a comparison. */
class Lane {
  constructor(choice, letter, body, choices, onVote) {
    Object.assign(this, { choice, letter, body, end: null });
    this.tokens = new TokenText(choice.name, choices);
    this.below = el("p", { class: "end row small soft" });
    const label = `Better: ${letter}, ${choice.name}`;
    this.better = button("Better", onVote, { "aria-pressed": "false", "aria-label": label });
    this.element = el(
      "section",
      { class: "answer", "aria-label": `${letter}: ${choice.name}` },
      el("h3", {}, el("span", { class: "letter" }, letter), choice.name),
      this.tokens.element,
      this.below,
    );
  }

  async run(api, signal, change) {
    const reader = new TokenReader();
    this.element.classList.add("writing");
    this.end = await runReply(api, this.body, signal, (piece, entries) =>
      change(() => this.tokens.append(reader.push(piece, entries))),
    );
    this.element.classList.remove("writing");
    change(() => {
      if (this.hasFailed) this.below.before(el("p", { class: "failure" }, this.end.message));
      this.below.append(el("span", {}, endSays(this.end)));
    });
  }

  get hasFailed() {
    return this.end.reason === "failed";
  }

  offerVote() {
    this.below.append(this.better);
  }

  get isChosen() {
    return this.better.getAttribute("aria-pressed") === "true";
  }

  set isChosen(is) {
    this.better.setAttribute("aria-pressed", String(is));
    this.element.classList.toggle("better", is);
  }
}

function percentTrue(flags) {
  return flags.length ? `${Math.round((100 * flags.filter(Boolean).length) / flags.length)} %` : "–";
}
