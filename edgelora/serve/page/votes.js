// Votes for the better answer: kept in the browser, exported as preference data.

import { Kept } from "./store.js";

export class Votes {
  /** `onChange(votes, isKept)` is called after each change; isKept is false where the browser would not keep them. */
  constructor(onChange) {
    this.kept = new Kept("localStorage", "edgelora.votes");
    this.onChange = onChange;
  }

  /**
   * [{ id, time, messages, answers: [{ adapter, scale, text }], chosen }], oldest first. `chosen` is the better one's
   * place, `scale` null for the base and for a blend, which is named with its scales ("a × 0.7 + b × 0.3"). Read anew
   * each time: another tab may have voted.
   */
  get all() {
    try {
      const votes = JSON.parse(this.kept.read() ?? "[]");
      return Array.isArray(votes) ? votes : [];
    } catch {
      return []; // written by something else
    }
  }

  /** One vote for each comparison: a second one replaces the first. */
  cast(vote) {
    this.#write([...this.all.filter(({ id }) => id !== vote.id), vote]);
  }

  retract(id) {
    this.#write(this.all.filter((vote) => vote.id !== id));
  }

  deleteAll() {
    this.#write([]);
  }

  /** How often each adapter's answer was the better one: [["support", 3], ["base", 1]]. */
  get tally() {
    const counts = new Map();
    for (const { answers, chosen } of this.all) {
      counts.set(answers[chosen].adapter, (counts.get(answers[chosen].adapter) ?? 0) + 1);
    }
    return [...counts].sort((a, b) => b[1] - a[1]);
  }

  /** Preference data as JSONL, a line for each answer not chosen: the conversational form of TRL's DPOTrainer. */
  get jsonl() {
    return this.all.flatMap(lines).map((line) => `${JSON.stringify(line)}\n`).join("");
  }

  #write(votes) {
    this.onChange(votes, this.kept.write(votes.length ? JSON.stringify(votes) : null));
  }
}

function lines({ time, messages, answers, chosen }) {
  const better = answers[chosen];
  const worse = answers.filter((answer, place) => place !== chosen && answer.text !== better.text);
  return worse.map((answer) => ({
    prompt: messages,
    chosen: [{ role: "assistant", content: better.text }],
    rejected: [{ role: "assistant", content: answer.text }],
    chosen_adapter: better.adapter,
    rejected_adapter: answer.adapter,
    chosen_scale: better.scale,
    rejected_scale: answer.scale,
    time,
  }));
}
