// Who answers: the base, one adapter at a scale, or a blend of several.

import { button, el } from "./elements.js";

const LEAST_TOP_SCALE = 2;
const MOST_PARTS = 16; // as many as the server blends

/** An adapter picker with its scale. */
class Part {
  constructor(models, onChange, onRemove = null) {
    this.models = models;
    this.mixes = onRemove !== null; // into what stands above it
    this.name = el("span");
    this.select = el("select");
    this.slider = el("input", { type: "range", min: 0, max: LEAST_TOP_SCALE, step: 0.05, value: 1 });
    this.output = el("span", { class: "value", "aria-hidden": "true" }); // the slider itself is read out
    this.scaleName = el("span");
    this.remove = this.mixes && button("Remove", onRemove);
    this.scaled = el("label", { class: "field scale" }, this.scaleName, this.slider, this.output);
    const picker = el("label", { class: "field" }, this.name, this.select);
    this.element = el("div", { class: "part" }, el("div", { class: "pick" }, picker, this.remove), this.scaled);
    this.select.addEventListener("change", () => {
      this.scaleTo(this.ownScale);
      onChange();
    });
    this.slider.addEventListener("input", () => {
      this.show();
      onChange();
    });
  }

  get model() {
    return this.select.value;
  }

  get ownScale() {
    return this.models.own(this.model).scale;
  }

  /** null for the base. */
  get scale() {
    return this.hasScale ? Number(this.slider.value) : null;
  }

  get hasScale() {
    return this.model !== "" && this.models.isAdapter(this.model);
  }

  scaleTo(scale) {
    this.slider.max = Math.max(LEAST_TOP_SCALE, this.ownScale);
    this.slider.step = Number.isInteger(scale * 20) ? 0.05 : "any"; // so that the scale is a step
    this.slider.value = scale;
    this.show();
  }

  show() {
    this.slider.disabled = !this.hasScale;
    this.scaled.hidden = this.model === "";
    this.output.textContent = this.hasScale ? this.scale.toFixed(2) : "–";
  }

  label(suffix, taken) {
    this.name.textContent = `Adapter${suffix}`;
    this.scaleName.textContent = `Scale${suffix}`;
    if (this.remove) this.remove.setAttribute("aria-label", `Remove ${this.model}`);
    for (const option of this.select.options) option.disabled = option.value !== this.model && taken.has(option.value);
  }
}

export class Lane {
  /** `none`: the choice that stands for no answer at all, or null where one has to answer. */
  constructor(models, letter, none, onChange) {
    Object.assign(this, { models, letter, none, onChange });
    this.parts = [new Part(models, onChange)];
    this.mix = button("Mix in another", () => this.#mixIn(), { class: "quiet mix" });
    this.element = el("div", { class: "lane" }, this.first.element, this.mix);
  }

  get first() {
    return this.parts[0];
  }

  get model() {
    return this.first.model;
  }

  /** The base has no parts: those that were mixed in wait until there is an adapter again. */
  get #acting() {
    return this.first.hasScale ? this.parts : [this.first];
  }

  /**
   * { name, model, scaled, fields }: `model` is whose settings are in force, `fields` what a request says of it all,
   * `scaled` the scale of a single adapter, null for the base and for a blend, whose name tells its scales.
   */
  get choice() {
    const parts = this.#acting;
    const { model, scale, ownScale } = this.first;
    if (parts.length > 1) {
      const adapters = Object.fromEntries(parts.map((part) => [part.model, part.scale]));
      const name = parts.map((part) => `${part.model} × ${part.scale}`).join(" + ");
      // The server takes the first one's settings; in an object that may be another than here, where names are numbers.
      return { name, model: Object.keys(adapters)[0], scaled: null, fields: { model, adapters } };
    }
    if (scale === null || scale === ownScale) return { name: model, model, scaled: scale, fields: { model } };
    return { name: `${model} × ${scale}`, model, scaled: scale, fields: { model, lora_scale: scale } };
  }

  /** One adapter, at its own scale. */
  choose(model) {
    this.parts.splice(1).forEach((part) => part.element.remove());
    this.first.select.value = model;
    this.first.scaleTo(this.first.ownScale);
  }

  /** Another model than this one, if there is one: nothing is learnt from an adapter beside itself. */
  chooseOther(model) {
    const other = this.models.inOrder.find((id) => id !== model);
    if (other !== undefined) this.choose(other);
  }

  /** The list of models has changed. */
  refill() {
    for (const part of this.parts) {
      this.models.fill(part.select, { none: part.mixes ? null : this.none, withBase: !part.mixes });
      part.show();
    }
  }

  show(compares) {
    const taken = new Set(this.#acting.map((part) => part.model));
    this.parts.forEach((part, at) => {
      const number = at ? String(at + 1) : "";
      part.label(compares ? ` ${this.letter}${number}` : number && ` ${number}`, taken);
      part.element.hidden = at > 0 && !this.first.hasScale;
    });
    this.mix.hidden = !this.first.hasScale || this.#free === undefined || this.parts.length === MOST_PARTS;
    if (compares) this.mix.setAttribute("aria-label", `Mix another into ${this.letter}`);
    else this.mix.removeAttribute("aria-label");
  }

  /** The first adapter that has no part yet. */
  get #free() {
    return this.models.inOrder.find((id) => this.models.isAdapter(id) && this.parts.every(({ model }) => model !== id));
  }

  #mixIn() {
    const model = this.#free;
    const part = new Part(this.models, this.onChange, () => this.#remove(part));
    this.models.fill(part.select, { withBase: false });
    part.select.value = model;
    part.scaleTo(part.ownScale / 2);
    this.parts.push(part);
    this.mix.before(part.element);
    this.onChange();
    part.select.focus();
  }

  #remove(part) {
    this.parts = this.parts.filter((each) => each !== part);
    part.element.remove();
    this.onChange();
    this.mix.focus();
  }
}
