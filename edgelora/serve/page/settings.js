// The panel: which adapters answer, how strongly, and with what settings.

import { el } from "./elements.js";
import { Lane } from "./lane.js";

const PARAMETERS = ["temperature", "top_p", "max_tokens", "seed"];
const LETTERS = ["A", "B", "C"];

export class Settings {
  /** `onChange(choices)` is called after each change of what is chosen or typed. */
  constructor(form, models, onChange) {
    this.form = form;
    this.models = models;
    this.onChange = onChange;
    this.compares = false;
    this.lanes = LETTERS.map((letter, at) => new Lane(models, letter, at === 2 ? "none" : null, () => this.#show()));
    form.querySelector("#lanes").append(...this.lanes.map((lane) => lane.element));
    this.panel = form.querySelector("#panel");
    this.out = form.querySelector("#out");
    this.isChosen = false;
    models.watch(() => this.#refill());
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => this.#show());
    form.addEventListener("reset", () => setTimeout(() => this.#reset()));
    this.#foldWhereNarrow();
    this.#show();
  }

  /** One adapter for the chat, or two or three beside each other. */
  set mode(name) {
    this.compares = name === "compare";
    const [a, b] = this.lanes;
    if (this.compares && a.choice.name === b.choice.name) b.chooseOther(a.model);
    this.#show();
  }

  /** Who answers, as `Lane.choice` has it. */
  get choices() {
    const lanes = this.compares ? this.lanes : this.lanes.slice(0, 1);
    return lanes.filter((lane) => lane.model).map((lane) => lane.choice);
  }

  /** Messages with the system prompt before them, where one is typed. */
  withSystem(messages) {
    const system = this.form.elements.system.value.trim();
    return system ? [{ role: "system", content: system }, ...messages] : messages;
  }

  /** The parameters that are typed; the others are left to the adapter. */
  get parameters() {
    const typed = PARAMETERS.filter((name) => this.form.elements[name].value !== "");
    return Object.fromEntries(typed.map((name) => [name, this.form.elements[name].valueAsNumber]));
  }

  /** The body of a chat completion's request. */
  request(choice, messages) {
    return { ...choice.fields, messages, ...this.parameters };
  }

  /** Whether there is who answers and all is valid; what is not is shown, and the panel unfolded for it. */
  check() {
    if (!this.choices.length) return false;
    if (this.form.checkValidity()) return true;
    this.panel.open = true;
    return this.form.reportValidity();
  }

  #refill() {
    this.lanes.forEach((lane) => lane.refill());
    if (!this.isChosen) this.#chooseFirst();
    this.#listOut(this.models.out);
    this.#show();
  }

  #listOut(models) {
    this.out.hidden = models.length === 0;
    const count = models.length === 1 ? "1 adapter" : `${models.length} adapters`;
    this.out.querySelector("summary").textContent = `${count} left out`;
    const items = models.map(({ id, edgelora: { state, problem } }) => {
      return el("li", {}, el("b", {}, id), ` ${state}: ${problem}`);
    });
    this.out.querySelector("ul").replaceChildren(...items);
  }

  #chooseFirst() {
    const ids = this.models.inOrder;
    if (!ids.length) return;
    this.isChosen = true;
    [ids[0], ids[1] ?? ids[0], ""].forEach((id, at) => this.lanes[at].choose(id));
  }

  #reset() {
    this.#chooseFirst();
    this.#show();
  }

  #show() {
    this.lanes.forEach((lane, at) => {
      lane.element.hidden = at > 0 && !this.compares;
      lane.show(this.compares);
    });
    const shown = this.choices.map(({ model }) => this.models.own(model));
    const own = (read) => {
      const values = new Set(shown.map(read).map((value) => String(value ?? "")));
      return values.size > 1 ? "varies" : [...values][0];
    };
    this.form.elements.system.placeholder = own(({ system }) => system) || "none";
    for (const name of PARAMETERS) {
      const otherwise = name === "seed" ? "random" : "default";
      this.form.elements[name].placeholder = own(({ sampling }) => sampling[name]) || otherwise;
    }
    this.form.querySelector("#settings-say").textContent = this.#summary();
    this.onChange(this.choices);
  }

  #summary() {
    const names = this.choices.map(({ name }) => name).join(", ") || "no adapter yet";
    const typed = Object.entries(this.parameters).map(([name, value]) => `${name.replace("_", " ")} ${value}`);
    return [names, ...typed].join(" · ");
  }

  #foldWhereNarrow() {
    const wide = window.matchMedia("(min-width: 56rem)");
    const fold = () => (this.panel.open = wide.matches);
    wide.addEventListener("change", fold);
    fold();
  }
}
