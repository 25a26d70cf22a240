// The base and the adapters that the server has, and the pickers that show them.

import { el } from "./elements.js";

export class Models {
  constructor(api) {
    this.api = api;
    this.listed = [];
    this.watchers = [];
  }

  /** Calls `watcher` after each change of the list. */
  watch(watcher) {
    this.watchers.push(watcher);
  }

  /** Asks the server; where it gives no answer, the list stays as it was, since the banner tells of that. */
  async refresh() {
    let listed;
    try {
      listed = await this.api.models();
    } catch {
      return;
    }
    if (JSON.stringify(listed) === JSON.stringify(this.listed)) return;
    this.listed = listed;
    for (const watcher of this.watchers) watcher();
  }

  get base() {
    return this.listed.find((model) => model.parent === null);
  }

  get ready() {
    return this.listed.filter(isReady);
  }

  /** The names of those that can answer, adapters first. */
  get inOrder() {
    const ids = this.ready.map(({ id }) => id);
    return [...ids.filter((id) => this.isAdapter(id)), ...ids.filter((id) => !this.isAdapter(id))];
  }

  /** Those that the server knows and does not let answer: refused or quarantined. */
  get out() {
    return this.listed.filter((model) => !isReady(model));
  }

  /** The adapter's own settings; empty ones for a model that is not listed. */
  own(id) {
    const { scale = 1, system = "", sampling = {} } = this.listed.find((model) => model.id === id)?.edgelora ?? {};
    return { scale, system, sampling };
  }

  isAdapter(id) {
    return id !== this.base?.id;
  }

  /** Fills a picker and leaves its choice alone; a chosen model that is gone stays, and is marked as gone. */
  fill(select, { none = null, withBase = true } = {}) {
    const chosen = select.value;
    const listed = this.ready.filter(({ id }) => withBase || this.isAdapter(id));
    const options = listed.map(({ id }) => {
      return el("option", { value: id }, this.isAdapter(id) ? id : `${id} (no adapter)`);
    });
    if (none !== null) options.unshift(el("option", { value: "" }, none));
    const isGone = chosen && !this.ready.some(({ id }) => id === chosen);
    if (isGone) options.push(el("option", { value: chosen }, `${chosen} (not loaded)`));
    select.replaceChildren(...options);
    if (chosen || none !== null) select.value = chosen;
  }
}

function isReady(model) {
  return (model.edgelora?.state ?? "ready") === "ready";
}
