// The server's API: models, load, and replies as streams of events.

import { Kept } from "./store.js";

const STATUS_TIMEOUT_MS = 8000;

/** An error that the server told, or that it could not be reached. `status` is 0 for the latter and in mid-stream. */
export class ApiFailure extends Error {
  constructor(message, { status = 0, code = "" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export class Api {
  /** `onKeyWanted(wasGiven)` is called when the server refuses for want of a key, or refuses the one it was given. */
  constructor(onKeyWanted) {
    this.kept = new Kept("sessionStorage", "edgelora.key");
    this.onKeyWanted = onKeyWanted;
  }

  get key() {
    return this.kept.read() ?? "";
  }

  set key(value) {
    this.kept.write(value || null);
  }

  /** The base and the adapters, also those that the server refused: [{ id, parent, root, edgelora: {...} }, ...]. */
  async models() {
    return (await this.#json("v1/models?all=true")).data;
  }

  /** { state, running, waiting, tokens_per_second, adapters_in_memory, restarts } */
  async status() {
    return this.#json("status");
  }

  /**
   * The chunks of a chat completion, as OpenAI's API has them.
   *
   * Throws ApiFailure where the server refuses, reports an error in mid-stream, or ends before it said so, and an
   * AbortError where `signal` stops it.
   */
  async *stream(body, signal) {
    const response = await this.#fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiFailure(chunk.error.message, { code: chunk.error.code ?? "" });
      yield chunk;
    }
    throw new ApiFailure("The connection ended before the reply did.");
  }

  async #json(path) {
    return (await this.#fetch(path, { signal: AbortSignal.timeout(STATUS_TIMEOUT_MS) })).json();
  }

  async #fetch(path, options) {
    const key = this.key;
    const headers = key ? { ...options.headers, Authorization: `Bearer ${key}` } : options.headers;
    let response;
    try {
      // Relative to the page, which may lie below a reverse proxy's path.
      response = await fetch(new URL(path, document.baseURI), { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiFailure("No answer from the server.");
    }
    if (response.ok) return response;
    if (response.status === 401) this.onKeyWanted(key !== "");
    throw await failureOf(response);
  }
}

async function failureOf(response) {
  const told = await response.json().catch(() => ({}));
  const message = told.error?.message ?? `The server answered with status ${response.status}.`;
  return new ApiFailure(message, { status: response.status, code: told.error?.code ?? "" });
}

/** The data of server-sent events, in order (https://html.spec.whatwg.org/multipage/server-sent-events.html). */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiFailure) throw error;
    throw new ApiFailure("The connection broke off.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
