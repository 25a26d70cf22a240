"""One request at work: what is left of its prompt, the token it writes next, and its text so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from edgelora.engine.adapters import Adapter
from edgelora.engine.cache import Key, KVSequence
from edgelora.engine.context import Context
from edgelora.engine.reply import ReplyText
from edgelora.engine.sampler import Sampler
from edgelora.engine.stream import Completion, Task
from edgelora.engine.tokenizer import Tokenizer
from edgelora.sampling import Sampling


@dataclass(frozen=True)
class Plan:
    """A request with everything looked up: which adapters, which tokens, which rules.

    Attributes:
        adapters: each with its scale; empty for the bare base.
        tokens: the prompt, fewer than `n_ctx`.
        n_ctx: tokens that prompt and reply may take together.
    """

    adapters: tuple[tuple[Adapter, float], ...]
    tokens: Sequence[int]
    sampling: Sampling
    n_ctx: int
    deterministic: bool

    @property
    def key(self) -> Key:
        """What its KV is computed under."""
        return tuple((adapter.content_hash, scale) for adapter, scale in self.adapters)


class Generation:
    """Writes one reply, a step at a time; `scheduler` decodes for it.

    Attributes:
        sequence: where its KV is; what that holds already is not read again.
        pending: the token to be decoded next; None while the prompt is read.
        reason: why it ended, as `Completion.finish_reason`; empty while it goes on.
    """

    def __init__(self, task: Task, plan: Plan, sequence: KVSequence, tokenizer: Tokenizer, n_vocab: int) -> None:
        self.task, self.plan, self.sequence = task, plan, sequence
        self.pending: int | None = None
        self.reason = ""
        self.served = 0  # tokens decoded since its group's turn began
        stops, control = plan.sampling.stop, tokenizer.control_tokens
        self._ends = tokenizer.end_tokens | {control[stop].id for stop in stops if stop in control}
        self._decoder, self._text = tokenizer.decoder(), ReplyText(stops)
        self._sampler = Sampler(plan.sampling, n_vocab, plan.tokens)
        self._limit = min(plan.sampling.max_tokens or plan.n_ctx, plan.n_ctx - len(plan.tokens))
        self._pieces: list[str] = []
        self._completion_tokens = 0
        self._cached_tokens = len(sequence.tokens)
        self._began = time.perf_counter()
        self._first_token = self._last_token = 0.0

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be decoded."""
        return max(0, len(self.plan.tokens) - len(self.sequence.tokens))

    def chunk(self, size: int) -> Sequence[int]:
        """The next `size` tokens of the prompt, or what is left."""
        start = len(self.sequence.tokens)
        return self.plan.tokens[start : start + size]

    def draw(self, context: Context, row: int) -> None:
        """Choose the next token from the logits of a row of the last decode, and emit what it completes.

        Raises:
            ModelFileError: the logits are not numbers.
        """
        token = self._sampler.draw(context.pointer, context.logits(row), row)
        self._last_token = time.perf_counter()
        self._first_token = self._first_token or self._last_token
        self.pending = token
        if token in self._ends:
            self.reason = "stop"
            return
        self._completion_tokens += 1
        self._say(self._text.feed(self._decoder.bytes_of(token)))
        if self._text.stopped:
            self.reason = "stop"
        elif self._completion_tokens >= self._limit:
            self.reason = "length"

    def end(self) -> Completion:
        """Emit what was held back; the account of the reply."""
        self._say(self._text.end())
        self._sampler.close()
        decoding, written = self._last_token - self._first_token, self._completion_tokens
        adapters = [adapter for adapter, _ in self.plan.adapters]
        return Completion(
            text="".join(self._pieces),
            finish_reason=self.reason,
            prompt_tokens=len(self.plan.tokens),
            cached_tokens=self._cached_tokens,
            completion_tokens=written,
            adapter="+".join(adapter.name for adapter in adapters) or "none",
            adapter_hash="+".join(adapter.content_hash for adapter in adapters),
            seconds_waiting=self._began - self.task.submitted,
            seconds_to_first_token=max(0.0, self._first_token - self.task.submitted),
            tokens_per_second=(written - 1) / decoding if written > 1 and decoding else 0.0,
        )

    def abandon(self) -> None:
        """Free what it holds, after an error."""
        self._sampler.close()

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self.task.items.put(text)


def unstarted(task: Task, plan: Plan, reason: str) -> Completion:
    """The account of a reply that was given up before it began."""
    adapters = [adapter for adapter, _ in plan.adapters]
    names, hashes = (adapter.name for adapter in adapters), (adapter.content_hash for adapter in adapters)
    waited = time.perf_counter() - task.submitted
    return Completion("", reason, len(plan.tokens), 0, 0, "+".join(names) or "none", "+".join(hashes), waited, 0.0, 0.0)
