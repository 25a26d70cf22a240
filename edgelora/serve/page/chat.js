// The conversation with one adapter at a time; every turn may be another's.

import { atEnd, button, el } from "./elements.js";
import { Prose } from "./prose.js";
import { endSays, runReply } from "./reply.js";

export class Chat {
  /** `onState` is called when a reply begins and when it ends. */
  constructor(api, settings, conversation, view, speech, onState) {
    Object.assign(this, { api, settings, conversation, view, speech, onState });
    this.turns = []; // { role, content, name, note, element }, as the conversation goes on from here
    this.running = null;
    this.keptSays = "";
    this.#showEmpty();
    this.#restore();
    // Chromium ends replies before "pagehide", and phones have no "beforeunload".
    for (const leaving of ["beforeunload", "pagehide"]) window.addEventListener(leaving, () => this.#leave());
  }

  /** Asks, and streams the reply below. */
  async ask(text) {
    // A question that got no answer is no part of what goes on: many templates want the two in turn.
    if (this.turns.at(-1)?.role === "user") this.turns.pop();
    this.#add({ role: "user", content: text, name: "You" });
    this.view.scrollTop = this.view.scrollHeight;
    await this.#reply();
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.#showEmpty();
    this.keep();
  }

  /** What is written so far is kept; a reply that the browser cuts would count as failed. */
  #leave() {
    if (!this.running) return;
    this.keep();
    this.stop();
  }

  get hasAnswers() {
    return this.turns.some(({ role }) => role === "assistant");
  }

  /** Has the browser keep the conversation as it is now. */
  keep() {
    this.keptSays = this.conversation.write(this.turns.filter(({ content }) => content !== ""));
  }

  #showEmpty() {
    const first = "Ask an adapter something. Each turn may go to another one: choose it in the settings.";
    const kept = "The conversation stays in this browser until you begin a new one; with a key, in this tab.";
    this.view.replaceChildren(el("div", { class: "empty soft" }, el("p", {}, first), el("p", {}, kept)));
  }

  #restore() {
    this.conversation.read().forEach((turn) => this.#add(turn));
    const last = this.turns.at(-1);
    for (const turn of this.turns) {
      if (turn.role === "assistant") turn.element.append(this.#end(turn, turn.note, turn === last && "Again"));
      else if (turn === last) turn.element.append(this.#end(turn, "The answer was lost.", "Try again"));
    }
    this.keep();
    this.view.scrollTop = this.view.scrollHeight;
  }

  /** Appends a turn, with what there is of it. */
  #add({ role, content, name = "", note = "" }) {
    this.view.querySelector(".empty")?.remove();
    const element = turnElement(name, role === "user" ? "you" : "reply");
    const prose = role === "user" ? null : new Prose(element.querySelector(".text"));
    if (!prose) element.querySelector(".text").append(content);
    else if (content) prose.finish(content);
    this.turns.push({ role, content, name, note, element, prose });
    this.view.append(element);
    return element;
  }

  async #reply() {
    const [choice] = this.settings.choices;
    const messages = this.settings.withSystem(this.turns.map(({ role, content }) => ({ role, content })));
    this.view.querySelectorAll(".again").forEach((old) => old.remove());
    atEnd(this.view, () => this.#add({ role: "assistant", content: "", name: choice.name, note: "stopped" }));
    const turn = this.turns.at(-1);
    this.keep();
    const controller = (this.running = new AbortController());
    this.onState();
    turn.element.classList.add("writing");
    this.speech.say(`${choice.name} answers.`);
    const end = await runReply(this.api, this.settings.request(choice, messages), controller.signal, (piece) => {
      turn.content += piece;
      atEnd(this.view, () => turn.prose.append(piece));
      this.speech.push(piece);
    });
    turn.element.classList.remove("writing");
    if (this.running === controller) this.running = null;
    if (this.turns.includes(turn)) this.#ended(turn, end); // not cleared meanwhile
    this.onState();
  }

  #ended(turn, end) {
    const failed = end.reason === "failed";
    turn.note = endSays(end);
    if (failed || turn.content === "") this.turns.pop(); // stays to be read, is not sent again
    this.keep();
    atEnd(this.view, () => {
      turn.prose.finish();
      if (failed) turn.element.append(el("p", { class: "failure" }, end.message));
      turn.element.append(this.#end(turn, turn.note, failed ? "Try again" : "Again"));
    });
    this.speech.end(failed ? `The reply failed: ${end.message}` : turn.note);
  }

  /** The line below a turn: how it ended, and below the last one a button that asks once more. */
  #end(turn, says, label) {
    const again = label && button(label, () => this.#again(turn), { class: "quiet again" });
    return el("p", { class: "end row small soft" }, says && el("span", {}, says), again);
  }

  /** The last question once more, with the settings as they are now. */
  async #again(turn) {
    if (this.running || !this.settings.check()) return;
    if (turn.role === "assistant") {
      turn.element.remove();
      this.turns = this.turns.filter((each) => each !== turn);
    } else turn.element.querySelector(".end").remove();
    await this.#reply();
  }
}

function turnElement(name, kind) {
  const parts = [el("h2", { title: name }, name), el("div", { class: "text" })];
  return el("article", { class: `turn ${kind}`, "aria-label": name }, ...parts);
}
