// One reply, from request to end.

/**
 * Streams a reply and hands on each piece, with the log probabilities of its tokens where they were asked for.
 *
 * Never throws; resolves to how it ended:
 *   { reason: "stop" | "length" | "stopped" | "failed" | ..., message, tokens, seconds, first }
 * `tokens` is null where the server did not get to say it; `first` (seconds to the first piece) where there was none.
 */
export async function runReply(api, body, signal, onPiece) {
  const began = performance.now();
  const since = () => (performance.now() - began) / 1000;
  const end = { reason: "stop", message: "", tokens: null, seconds: 0, first: null };
  try {
    for await (const chunk of api.stream(body, signal)) {
      if (chunk.usage) end.tokens = chunk.usage.completion_tokens;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const text = choice.delta?.content ?? "";
      const entries = choice.logprobs?.content ?? [];
      if (choice.finish_reason) end.reason = choice.finish_reason;
      if (!text && !entries.length) continue;
      end.first ??= since();
      onPiece(text, entries);
    }
  } catch (error) {
    end.reason = error.name === "AbortError" ? "stopped" : "failed";
    end.message = error.message;
  }
  end.seconds = since();
  return end;
}

/** Tokens a second: 38.1, but 2353. */
export function speed(value) {
  return value.toFixed(value < 100 ? 1 : 0);
}

/** What a reply's end says in a line: "42 tokens · 38.1 tok/s · first after 0.12 s". */
export function endSays(end) {
  const said = [];
  if (end.tokens !== null) said.push(end.tokens === 1 ? "1 token" : `${end.tokens} tokens`);
  const writing = end.first === null ? 0 : end.seconds - end.first;
  if (end.tokens > 1 && writing > 0) said.push(`${speed((end.tokens - 1) / writing)} tok/s`);
  if (end.first !== null) said.push(`first after ${end.first.toFixed(2)} s`);
  if (end.reason === "length") said.push("ended at max tokens");
  if (end.reason === "stopped") said.push("stopped");
  return said.join(" · ");
}
