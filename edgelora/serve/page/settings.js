// The panel: which adapters answer, how strongly, and with what settings.

import { el } from "./elements.js";

const PARAMETERS = ["temperature", "top_p", "max_tokens", "seed"];
const LETTERS = ["A", "B", "C"];
const LEAST_TOP_SCALE = 2;

/** An adapter picker with its scale. */
class Lane {
  constructor(models, letter, onChange) {
    this.models = models;
    this.letter = letter;
    this.name = el("span", { class: "name" });
    this.select = el("select");
    this.slider = el("input", { type: "range", min: 0, max: LEAST_TOP_SCALE, step: 0.05, value: 1 });
    this.output = el("span", { class: "value" }); // no <output>, which would be read out besides the slider
    this.scaleName = el("span");
    this.scale = el("label", { class: "field scale" }, this.scaleName, this.slider, this.output);
    this.element = el("div", { class: "lane" }, el("label", { class: "field" }, this.name, this.select), this.scale);
    this.select.addEventListener("change", () => {
      this.scaleToOwn();
      onChange();
    });
    this.slider.addEventListener("input", () => {
      this.showScale();
      onChange();
    });
  }

  get model() {
    return this.select.value;
  }

  get ownScale() {
    return this.models.own(this.model).scale;
  }

  /** { model, name, scaled, scale }; `scaled` is null for the base, `scale` also where it is the adapter's own. */
  get choice() {
    const scaled = this.hasScale ? Number(this.slider.value) : null;
    const scale = scaled === this.ownScale ? null : scaled;
    return { model: this.model, name: scale === null ? this.model : `${this.model} × ${scale}`, scaled, scale };
  }

  get hasScale() {
    return this.model !== "" && this.models.isAdapter(this.model);
  }

  /** Another model than this one, if there is one: nothing is learnt from an adapter beside itself. */
  chooseOther(model) {
    const other = this.models.inOrder.find((id) => id !== model);
    if (other === undefined) return;
    this.select.value = other;
    this.scaleToOwn();
  }

  scaleToOwn() {
    this.slider.max = Math.max(LEAST_TOP_SCALE, this.ownScale);
    this.slider.step = Number.isInteger(this.ownScale * 20) ? 0.05 : "any"; // so that its own scale is a step
    this.slider.value = this.ownScale;
    this.showScale();
  }

  showScale() {
    this.slider.disabled = !this.hasScale;
    this.scale.hidden = this.model === "";
    this.output.textContent = this.hasScale ? Number(this.slider.value).toFixed(2) : "–";
  }

  label(compares) {
    this.name.textContent = compares ? `Adapter ${this.letter}` : "Adapter";
    this.scaleName.textContent = compares ? `Scale ${this.letter}` : "Scale";
  }
}

export class Settings {
  /** `onChange(choices)` is called after each change of what is chosen or typed. */
  constructor(form, models, onChange) {
    this.form = form;
    this.models = models;
    this.onChange = onChange;
    this.compares = false;
    this.lanes = LETTERS.map((letter) => new Lane(models, letter, () => this.#show()));
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

  /** The adapters that answer: [{ model, scale, name }, ...]. */
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
    const scale = choice.scale === null ? {} : { lora_scale: choice.scale };
    return { model: choice.model, messages, ...scale, ...this.parameters };
  }

  /** Whether all is valid; what is not is shown, and the panel unfolded for it. */
  check() {
    if (this.form.checkValidity()) return true;
    this.panel.open = true;
    return this.form.reportValidity();
  }

  #refill() {
    this.lanes.forEach((lane, at) => this.models.fill(lane.select, at === 2 ? "none" : null));
    if (!this.isChosen) this.#chooseFirst();
    this.lanes.forEach((lane) => lane.showScale());
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
    this.lanes[0].select.value = ids[0];
    this.lanes[1].select.value = ids[1] ?? ids[0];
    this.lanes.forEach((lane) => lane.scaleToOwn());
  }

  #reset() {
    this.#chooseFirst();
    this.#show();
  }

  #show() {
    this.lanes.forEach((lane, at) => {
      lane.element.hidden = at > 0 && !this.compares;
      lane.label(this.compares);
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
