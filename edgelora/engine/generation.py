"""One request on the context: prefill in chunks, then token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from edgelora.engine.adapters import Adapter
from edgelora.engine.cache import CHUNK, KVCache
from edgelora.engine.context import Context, Interrupted
from edgelora.engine.native import InterruptFlag
from edgelora.engine.reply import ReplyText
from edgelora.engine.sampler import Sampler
from edgelora.engine.stream import Completion
from edgelora.engine.tokenizer import Tokenizer
from edgelora.sampling import Sampling


@dataclass(frozen=True)
class Plan:
    """A request with everything looked up: which adapter, which tokens, which rules.

    Attributes:
        tokens: the prompt, fewer than `n_ctx`.
        n_ctx: tokens that prompt and reply may take together.
    """

    adapter: Adapter
    scale: float
    tokens: list[int]
    sampling: Sampling
    n_ctx: int
    deterministic: bool


class Generation:
    """Writes one reply.

    Args:
        emit: receives the text, piece by piece.
        submitted: when the request was made (`time.perf_counter`).
    """

    def __init__(
        self,
        plan: Plan,
        context: Context,
        cache: KVCache,
        tokenizer: Tokenizer,
        emit: Callable[[str], None],
        submitted: float,
    ) -> None:
        self.plan, self.context, self.cache, self.tokenizer = plan, context, cache, tokenizer
        self._emit, self._submitted = emit, submitted
        self._pieces: list[str] = []
        self._completion_tokens = self._cached_tokens = 0
        self._first_token = self._last_token = 0.0

    def run(self, interrupt: InterruptFlag) -> Completion:
        """The reply, to its end.

        Raises:
            EdgeloraError: llama.cpp failed, or the logits are not numbers. What the sequence held is forgotten.
        """
        plan = self.plan
        self.context.use_adapter(plan.adapter.pointer, plan.scale)
        sequence = self.cache.take(
            (plan.adapter.content_hash, plan.scale), plan.tokens, deterministic=plan.deterministic
        )
        self._cached_tokens = len(sequence.tokens)
        sampler = Sampler(plan.sampling, self.context.n_vocab, plan.tokens)
        self.context.interrupt_with(interrupt)
        try:
            while len(sequence.tokens) < len(plan.tokens):
                if interrupt.is_set():
                    raise Interrupted
                start = len(sequence.tokens)
                chunk = plan.tokens[start : start + CHUNK]
                self.context.decode(sequence.id, chunk, start)
                sequence.extend(chunk)
            reason = self._write(sequence.id, sequence.extend, sampler, interrupt)
        except Interrupted:
            reason = "cancelled"
        except BaseException:
            self.cache.drop(sequence)
            raise
        finally:
            sampler.close()
            self.context.interrupt_with(None)
        return self._completion(reason)

    def _write(
        self, sequence: int, note: Callable[[tuple[int]], None], sampler: Sampler, interrupt: InterruptFlag
    ) -> str:
        """The decode loop; everything it touches for each token is a local name."""
        plan, context, emit = self.plan, self.context, self._say
        stops = plan.sampling.stop
        control = self.tokenizer.control_tokens
        ends = self.tokenizer.end_tokens | {control[stop].id for stop in stops if stop in control}
        decoder, text = self.tokenizer.decoder(), ReplyText(stops)
        position = len(plan.tokens)
        limit = min(plan.sampling.max_tokens or plan.n_ctx, plan.n_ctx - position)
        try:
            while not interrupt.is_set():
                token = sampler.draw(context.pointer, context.logits())
                self._last_token = time.perf_counter()
                self._first_token = self._first_token or self._last_token
                if token in ends:
                    return "stop"
                self._completion_tokens += 1
                emit(text.feed(decoder.bytes_of(token)))
                if text.stopped:
                    return "stop"
                if self._completion_tokens >= limit:
                    return "length"
                context.decode(sequence, (token,), position)
                note((token,))
                position += 1
            return "cancelled"
        finally:
            emit(text.end())

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._emit(text)

    def _completion(self, reason: str) -> Completion:
        decoding = self._last_token - self._first_token
        return Completion(
            text="".join(self._pieces),
            finish_reason=reason,
            prompt_tokens=len(self.plan.tokens),
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            adapter=self.plan.adapter.name,
            adapter_hash=self.plan.adapter.content_hash,
            seconds_to_first_token=max(0.0, self._first_token - self._submitted),
            tokens_per_second=(self._completion_tokens - 1) / decoding
            if self._completion_tokens > 1 and decoding
            else 0.0,
        )
