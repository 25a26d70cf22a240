// The conversation as the browser keeps it: until a new one begins; what was had with a key, in this tab alone.

import { Kept } from "./store.js";

const NAME = "edgelora.conversation";
const MOST_CHARACTERS = 1_000_000; // of the five million that a page has, which votes share
const ROLES = ["user", "assistant"];

export class Conversation {
  constructor(api) {
    this.api = api;
    this.ofAnyone = new Kept("localStorage", NAME);
    this.ofKey = new Kept("sessionStorage", NAME); // as long as the key itself
  }

  get #kept() {
    return this.api.key ? this.ofKey : this.ofAnyone;
  }

  /** [{ role, content, name, note }], oldest first: `name` is who wrote it, `note` how the reply ended. */
  read() {
    try {
      const turns = JSON.parse(this.#kept.read() ?? "[]");
      return Array.isArray(turns) ? turns.filter(isTurn) : [];
    } catch {
      return []; // written by something else
    }
  }

  /** Keeps these turns instead of what was kept. Returns what there is to tell of it. */
  write(turns) {
    const latest = latestOf(turns.map(({ role, content, name, note }) => ({ role, content, name, note })));
    const isKept = this.#kept.write(latest.length ? JSON.stringify(latest) : null);
    if (!isKept) this.#kept.write(null); // what was kept before is not this conversation
    if (!turns.length) return "";
    const where = this.api.key ? "tab" : "browser";
    if (!isKept || !latest.length) return `This ${where} has no room to keep the conversation`;
    return latest.length < turns.length ? `Kept in this ${where}: the last ${latest.length} turns` : `Kept in this ${where}`;
  }

  /** What nobody in particular said, and is now the key's to keep. */
  handOver() {
    this.ofAnyone.write(null);
  }
}

/** As many of the last turns as there is room for, from a question on. */
function latestOf(turns) {
  let room = MOST_CHARACTERS;
  let from = turns.length;
  for (let at = turns.length - 1; at >= 0; at--) {
    room -= JSON.stringify(turns[at]).length + 1;
    if (room < 0) break;
    if (turns[at].role === "user") from = at;
  }
  return turns.slice(from);
}

function isTurn(turn) {
  return ROLES.includes(turn?.role) && typeof turn.content === "string";
}
