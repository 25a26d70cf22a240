// Load at a glance, asked for every two seconds, and the banner for when the server is not there.

import { svg } from "./elements.js";
import { speed } from "./reply.js";

const EVERY_MS = 2000;
const COUNTS = ["running", "waiting", "adapters_in_memory"];
const SHOWN = 60; // two minutes
const WIDTH = 96;
const HEIGHT = 22;

const BANNERS = {
  restarting: "The engine is restarting. Replies under way have ended. This note goes when it is back.",
  restarted: "The engine died and is back. Replies that were under way have ended.", // all of it between two looks
  ending: "The server is ending. Replies under way are finished, new ones are refused.",
  starting: "The engine is starting and loads the base. This note goes when it is ready.",
};

export class Load {
  /** `onBack` is called when the server is ready after it was not. */
  constructor(api, list, banner, onBack) {
    Object.assign(this, { api, list, banner, onBack, speeds: [], wasDown: false, timer: 0 });
    this.line = svg("polyline", { fill: "none" });
    const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" }, this.line);
    this.#cell("tokens_per_second").after(drawing);
    document.addEventListener("visibilitychange", () => document.hidden || this.look());
  }

  /** Asks now, and again every two seconds, but not while the page is hidden or wants a key. */
  async look() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    const turn = (this.turn = {});
    let status = null;
    let problem = "";
    try {
      status = await this.api.status();
      problem = this.#problemOf(status);
    } catch (error) {
      if (error.status === 401) status = { state: "locked" };
      else problem = `${error.message.replace(/[^.!?]$/, "$&.")} Trying again every ${EVERY_MS / 1000} seconds.`;
    }
    if (turn !== this.turn) return; // a later look is under way
    this.#show(status, problem);
    clearTimeout(this.timer);
    if (status?.state === "locked") return; // until there is a key
    this.timer = setTimeout(() => this.look(), EVERY_MS);
  }

  #problemOf({ state, restarts = 0 }) {
    const restarted = restarts > (this.restarts ?? restarts);
    this.restarts = restarts;
    if (state !== "ready") return BANNERS[state] ?? `The server is ${state}.`;
    return restarted ? BANNERS.restarted : "";
  }

  #show(status, problem) {
    // The same words are not set again: each setting would be read out.
    if (this.banner.textContent !== problem) this.banner.textContent = problem;
    const state = status?.state ?? "no answer";
    this.list.dataset.state = state;
    this.#cell("state").textContent = state;
    for (const name of COUNTS) this.#cell(name).textContent = status?.[name] ?? "–";
    const value = status?.tokens_per_second ?? null;
    this.#cell("tokens_per_second").textContent = value === null ? "–" : speed(value);
    this.#draw(value ?? 0);
    if (state === "ready" && this.wasDown) this.onBack();
    this.wasDown = problem !== "";
  }

  #draw(value) {
    this.speeds = [...this.speeds, value].slice(-SHOWN);
    const highest = Math.max(1, ...this.speeds);
    const step = WIDTH / (SHOWN - 1);
    const left = WIDTH - step * (this.speeds.length - 1);
    const points = this.speeds.map((each, at) => {
      const y = HEIGHT - 1 - (each / highest) * (HEIGHT - 2);
      return `${(left + at * step).toFixed(1)},${y.toFixed(1)}`;
    });
    this.line.setAttribute("points", points.join(" "));
  }

  #cell(name) {
    return this.list.querySelector(`[data-of="${name}"]`);
  }
}
