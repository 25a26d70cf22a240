// The conversation with one adapter at a time; every turn may be another's.

import { atEnd, button, el } from "./elements.js";
import { endSays, runReply } from "./reply.js";

export class Chat {
  /** `onState` is called when a reply begins and when it ends. */
  constructor(api, settings, view, speech, onState) {
    Object.assign(this, { api, settings, view, speech, onState });
    this.turns = []; // { role, content, element }, as the conversation goes on from here
    this.running = null;
    this.clear();
  }

  /** Asks, and streams the reply below. */
  async ask(text) {
    this.view.querySelector(".empty")?.remove();
    // A question that got no answer is no part of what goes on: many templates want the two in turn.
    if (this.turns.at(-1)?.role === "user") this.turns.pop();
    this.#add({ role: "user", content: text }, turnElement("You", "you", text));
    this.view.scrollTop = this.view.scrollHeight;
    await this.#reply();
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.view.replaceChildren(
      el(
        "div",
        { class: "empty soft" },
        el("p", {}, "Ask an adapter something. Each turn may go to another one: choose it in the settings."),
      ),
    );
  }

  #add(turn, element) {
    this.turns.push({ ...turn, element });
    this.view.append(element);
  }

  async #reply() {
    const [choice] = this.settings.choices;
    const messages = this.settings.withSystem(this.turns.map(({ role, content }) => ({ role, content })));
    const element = turnElement(choice.name, "reply");
    const text = element.querySelector(".text");
    const written = text.appendChild(document.createTextNode(""));
    this.view.querySelectorAll(".again").forEach((old) => old.remove());
    const turn = { role: "assistant", content: "" };
    atEnd(this.view, () => this.#add(turn, element));
    const kept = this.turns.at(-1);
    const controller = (this.running = new AbortController());
    this.onState();
    element.classList.add("writing");
    this.speech.say(`${choice.name} answers.`);
    const end = await runReply(this.api, this.settings.request(choice, messages), controller.signal, (piece) => {
      kept.content += piece;
      atEnd(this.view, () => written.appendData(piece));
      this.speech.push(piece);
    });
    element.classList.remove("writing");
    if (this.running === controller) this.running = null;
    if (!this.turns.includes(kept)) return this.onState(); // cleared meanwhile
    if (end.reason === "failed" || kept.content === "") this.turns.pop(); // stays to be read, is not sent again
    atEnd(this.view, () => element.append(...this.#below(kept, end)));
    this.speech.end(end.reason === "failed" ? `The reply failed: ${end.message}` : endSays(end));
    this.onState();
  }

  #below(turn, end) {
    const failed = end.reason === "failed";
    const again = button(failed ? "Try again" : "Again", () => this.#again(turn), { class: "quiet again" });
    const said = el("p", { class: "end row small soft" }, endSays(end) && el("span", {}, endSays(end)), again);
    return failed ? [el("p", { class: "failure" }, end.message), said] : [said];
  }

  /** The last reply once more, with the settings as they are now. */
  async #again(turn) {
    if (this.running || !this.settings.check()) return;
    turn.element.remove();
    this.turns = this.turns.filter((each) => each !== turn);
    await this.#reply();
  }
}

function turnElement(name, kind, text = "") {
  const parts = [el("h2", { title: name }, name), el("div", { class: "text" }, text)];
  return el("article", { class: `turn ${kind}`, "aria-label": name }, ...parts);
}
