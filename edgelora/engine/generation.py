"""One request at work: what is left of its prompt, the token it writes next, and its text so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelora.engine.adapters import Adapter
from edgelora.engine.cache import Key, KVSequence, Wanted
from edgelora.engine.context import Context
from edgelora.engine.grammar import GrammarDecoder, written
from edgelora.engine.reply import ReplyText
from edgelora.engine.sampler import Sampler, likeliest, log_probabilities
from edgelora.engine.stream import Completion, Piece, Task, TokenLogprob
from edgelora.engine.tokenizer import Tokenizer
from edgelora.sampling import Sampling
from edgelora.tools.use import ToolUse


@dataclass(frozen=True)
class Plan:
    """A request with everything looked up: which adapters, which tokens, which rules.

    Attributes:
        adapters: each with its scale; empty for the bare base, and for what a bundle has inside.
        tokens: the prompt, fewer than `n_ctx`.
        n_ctx: tokens that prompt and reply may take together.
        begins: the first token that the adapters act on: an activated LoRA's invocation.
        dropped: tokens of the conversation that were left out, so that it fits.
        tenant: whose request it is; None where nobody is told apart.
        public: the first tokens, which are the operator's own: those of the template and the adapter's system prompt.
        tools: what the reply may call; None for none.
        bundled: the adapter that a control token in `tokens` switches on.
    """

    adapters: tuple[tuple[Adapter, float], ...]
    tokens: Sequence[int]
    sampling: Sampling
    n_ctx: int
    deterministic: bool
    begins: int = 0
    dropped: int = 0
    bundled: Adapter | None = None
    tenant: str | None = None
    public: int = 0
    tools: ToolUse | None = None

    def key_at(self, position: int) -> Key:
        """What the KV of a position is computed under."""
        return self.key if position >= self.begins else ()

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.key, self.tokens, self.begins, self.deterministic, self.tenant, self.public)

    @property
    def answering(self) -> list[Adapter]:
        """Who answers, for the account."""
        return [self.bundled] if self.bundled else [adapter for adapter, _ in self.adapters]

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
        read_from: where reading its prompt began; None until it did.
        passed_over: how often another's prompt was read instead.
    """

    def __init__(self, task: Task, plan: Plan, sequence: KVSequence, tokenizer: Tokenizer, n_vocab: int) -> None:
        self.task, self.plan, self.sequence = task, plan, sequence
        self.pending: int | None = None
        self.reason = ""
        self.read_from: int | None = None
        self.passed_over = 0
        stops, control = plan.sampling.stop, tokenizer.control_tokens
        self._ends = tokenizer.end_tokens | {control[stop].id for stop in stops if stop in control}
        follows_grammar = plan.sampling.gbnf is not None
        self._decoder = GrammarDecoder(tokenizer) if follows_grammar else tokenizer.decoder()
        self._text, self._vocab, self._n_vocab = ReplyText(stops), tokenizer.vocab, n_vocab
        self._sampler = Sampler(plan.sampling, tokenizer, plan.tokens, self._ends, plan.tools)
        self._logprobs: list[TokenLogprob] = []
        self._limit = min(plan.sampling.max_tokens or plan.n_ctx, plan.n_ctx - len(plan.tokens))
        self._pieces: list[str] = []
        self._calls = plan.tools.parser() if plan.tools else None
        markers = plan.tools.markers if plan.tools else frozenset[str]()
        self._markers = {control[text].id: text.encode() for text in markers if text in control}
        self._said = 0  # log probabilities that went with a piece, or with what is no text
        self._completion_tokens = 0
        self._began = time.perf_counter()
        self._first_token = self._last_token = 0.0

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be decoded."""
        return max(0, len(self.plan.tokens) - len(self.sequence.tokens))

    @property
    def next_token(self) -> int:
        """What is decoded next: of the prompt, or the one that was drawn."""
        return self.plan.tokens[len(self.sequence.tokens)] if self.pending is None else self.pending

    def chunk(self, size: int) -> Sequence[int]:
        """The next `size` tokens of the prompt, or what is left."""
        start = len(self.sequence.tokens)
        return self.plan.tokens[start : start + size]

    def draw(self, context: Context, row: int) -> None:
        """Choose the next token from the logits of a row of the last decode, and emit what it completes.

        Raises:
            ModelFileError: the logits are not numbers.
        """
        logits = context.logits(row)
        token = self._sampler.draw(context.pointer, logits, row)
        self._last_token = time.perf_counter()
        self._first_token = self._first_token or self._last_token
        self.pending = token
        if token in self._ends:
            self.reason = "stop"
            return
        self._completion_tokens += 1
        data = self._markers.get(token) or self._decoder.bytes_of(token)
        if self.plan.sampling.logprobs is not None:
            self._logprobs.append(self._judged(logits, token, data, self.plan.sampling.logprobs))
        self._say(self._text.feed(data))
        if self._text.stopped or self._has_called:
            self.reason = "stop"
        elif self._completion_tokens >= self._limit:
            self.reason = "length"

    def end(self) -> Completion:
        """Emit what was held back; the account of the reply."""
        self._say(self._text.end(), is_last=True)
        self._sampler.close()
        calls = tuple(self._calls.calls) if self._calls else ()
        if self.plan.tools and not self.plan.tools.parallel:
            calls = calls[:1]
        decoding, count = self._last_token - self._first_token, self._completion_tokens
        adapters = self.plan.answering
        return Completion(
            text="".join(self._pieces),
            finish_reason="tool_calls" if calls and self.reason == "stop" else self.reason,
            prompt_tokens=len(self.plan.tokens),
            cached_tokens=self.read_from or 0,
            dropped_tokens=self.plan.dropped,
            completion_tokens=count,
            adapter="+".join(adapter.name for adapter in adapters) or "none",
            adapter_hash="+".join(adapter.content_hash for adapter in adapters),
            seconds_waiting=self._began - self.task.submitted,
            seconds_to_first_token=max(0.0, self._first_token - self.task.submitted),
            tokens_per_second=(count - 1) / decoding if count > 1 and decoding else 0.0,
            logprobs=None if self.plan.sampling.logprobs is None else tuple(self._logprobs),
            tool_calls=calls,
        )

    @property
    def _has_called(self) -> bool:
        """Whether the one call that it may make is made."""
        return bool(self._calls and self._calls.calls and self.plan.tools and not self.plan.tools.parallel)

    def abandon(self) -> None:
        """Free what it holds, after an error."""
        self._sampler.close()

    def _judged(self, pointer: Any, token: int, data: bytes, alternatives: int) -> TokenLogprob:
        logits = np.ctypeslib.as_array(pointer, (self._n_vocab,))
        best = likeliest(logits, alternatives)
        own, *others = log_probabilities(logits, [token, *best])
        top = (TokenLogprob(each, written(self._vocab, each), value) for each, value in zip(best, others, strict=True))
        return TokenLogprob(token, data, own, tuple(top))

    def _say(self, text: str, *, is_last: bool = False) -> None:
        passed = self._calls.passed if self._calls else 0
        if self._calls:
            text = self._calls.feed(text) + (self._calls.end() if is_last else "")
        if text:
            self._pieces.append(text)
            self.task.put(Piece(text, tuple(self._logprobs[self._said :])))
        if text or (self._calls and self._calls.passed > passed):  # a call's tokens are no text's
            self._said = len(self._logprobs)


def unstarted(task: Task, plan: Plan, reason: str) -> Completion:
    """The account of a reply that was given up before it began."""
    adapters = plan.answering
    waited = time.perf_counter() - task.submitted
    return Completion(
        text="",
        finish_reason=reason,
        prompt_tokens=len(plan.tokens),
        cached_tokens=0,
        dropped_tokens=plan.dropped,
        completion_tokens=0,
        adapter="+".join(adapter.name for adapter in adapters) or "none",
        adapter_hash="+".join(adapter.content_hash for adapter in adapters),
        seconds_waiting=waited,
        seconds_to_first_token=0.0,
        tokens_per_second=0.0,
    )
