"""How likely a model takes a reply that is given: teacher forcing, as a loss in training and perplexity see it.

A reply is read from an empty memory, the prompt in chunks and then the reply, so that its numbers depend on nothing
that was read before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelora.engine.cache import CHUNK
from edgelora.engine.context import Applied, Context
from edgelora.engine.model import Model
from edgelora.engine.perplexity import negative_log_likelihoods
from edgelora.errors import ContextOverflowError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SPEED_PROMPT, SPEED_REPLY = 256, 32
"""Tokens read and written to measure the speed: a second or two for a model that writes 20 a second."""


@dataclass(frozen=True)
class TopTokens:
    """At each place, the likeliest tokens: ids (n, k), the best first, and their log-probabilities, float64 (n, k)."""

    ids: Ints
    log_probs: Floats


@dataclass(frozen=True)
class ReplyScore:
    """A reply of n tokens under a model; the last one ends it, where the template writes one that does.

    Attributes:
        tokens: int64 (n,).
        losses: -log p of each token, float64 (n,), in nats.
        best: the model's likeliest token at each place, int64 (n,).
        top: as many of the likeliest as were asked for.
        at: log-probabilities of the ids that were asked for, float64 (n, k).
    """

    tokens: Ints
    losses: Floats
    best: Ints
    top: TopTokens | None = None
    at: Floats | None = None


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one conversation: reading a prompt, and writing."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Wanted:
    """What `Scorer.score` reports beside the losses: the `top` likeliest tokens, and what is `at` given ids (n, k)."""

    top: int = 0
    at: Ints | None = None


class Scorer:
    """A context of its own for whole conversations. Lives on the engine's thread.

    Args:
        n_ctx: the most tokens of a prompt and its reply.

    Raises:
        EdgeloraError: not enough memory.
    """

    def __init__(self, model: Model, n_ctx: int, threads: int) -> None:
        self._n_ctx = n_ctx
        self._context = Context(model, n_ctx=n_ctx, n_sequences=1, threads=threads, n_batch=CHUNK)

    def score(
        self,
        prompt: Sequence[int],
        reply: Sequence[int],
        applied: Applied,
        begins: int = 0,
        wanted: Wanted | None = None,
    ) -> ReplyScore:
        """The losses of a reply of at least a token.

        Args:
            applied: adapters; they act from position `begins` on.

        Raises:
            ContextOverflowError: prompt and reply are too long.
            EdgeloraError: llama.cpp failed, with its reason; or logits that are not finite.
        """
        length = len(prompt) + len(reply)
        if length > self._n_ctx:
            raise ContextOverflowError(
                f"prompt and reply are {length} tokens long; this context window has {self._n_ctx}",
                hint="Leave the row out, or ask for a larger window: --ctx-size.",
            )
        wanted, targets = wanted or Wanted(), np.array(reply, np.int64)
        last = len(prompt) - 1
        self._context.trim(0, 0)
        for first, end, adapters in ((0, min(begins, last), ()), (min(begins, last), last, applied)):
            self._read(prompt[first:end], first, adapters)
        predicting = [prompt[last], *reply[:-1]]
        self._context.apply(applied)
        parts = []
        for start in range(0, len(predicting), CHUNK):
            chunk = predicting[start : start + CHUNK]
            self._context.decode(0, chunk, last + start, every=True)
            at = None if wanted.at is None else wanted.at[start : start + CHUNK]
            logits = self._context.all_logits(len(chunk))
            parts.append(_scored(logits, targets[start : start + CHUNK], wanted.top, at))
        return _joined(parts)

    def _read(self, tokens: Sequence[int], position: int, applied: Applied) -> None:
        if tokens:
            self._context.apply(applied)
        for start in range(0, len(tokens), CHUNK):
            self._context.decode(0, tokens[start : start + CHUNK], position + start)

    def speed(self, applied: Applied) -> Speed:
        """Read and write a few tokens, and look at the clock.

        Raises:
            EdgeloraError: llama.cpp failed, with its reason.
        """
        n_prompt = max(1, min(SPEED_PROMPT, self._n_ctx // 2))
        n_reply = max(1, min(SPEED_REPLY, self._n_ctx - n_prompt))
        self._context.trim(0, 0)
        self._read([0], 0, applied)  # the first decode pays for the graph and for pages that are not in memory
        self._context.trim(0, 0)
        started = time.perf_counter()
        self._read([0] * n_prompt, 0, applied)
        read = time.perf_counter()
        for position in range(n_prompt, n_prompt + n_reply):
            self._read([0], position, applied)
        return Speed(n_prompt / (read - started), n_reply / (time.perf_counter() - read))

    def release(self) -> None:
        """Let go of the adapters that are set."""
        self._context.apply(())

    def close(self) -> None:
        self._context.close()


def _scored(logits: npt.NDArray[np.float32], targets: Ints, top: int, at: Ints | None) -> ReplyScore:
    losses = negative_log_likelihoods(logits, targets)
    rows = np.arange(len(targets))
    # log-softmax of any token is its logit less this.
    totals = (losses + logits[rows, targets])[:, None]
    best = logits.argmax(axis=1).astype(np.int64)
    likeliest = None
    if top:
        ids = np.argpartition(-logits, min(top, logits.shape[1] - 1), axis=1)[:, :top].astype(np.int64)
        order = np.argsort(-np.take_along_axis(logits, ids, axis=1), axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, axis=1)
        likeliest = TopTokens(ids, np.take_along_axis(logits, ids, axis=1) - totals)
    given = None if at is None else np.take_along_axis(logits, at, axis=1) - totals
    return ReplyScore(targets, losses, best, likeliest, given)


def _joined(parts: Sequence[ReplyScore]) -> ReplyScore:
    tops = [part.top for part in parts if part.top]
    ats = [part.at for part in parts if part.at is not None]
    top = (
        TopTokens(np.concatenate([t.ids for t in tops]), np.concatenate([t.log_probs for t in tops])) if tops else None
    )
    return ReplyScore(
        tokens=np.concatenate([part.tokens for part in parts]),
        losses=np.concatenate([part.losses for part in parts]),
        best=np.concatenate([part.best for part in parts]),
        top=top,
        at=np.concatenate(ats) if ats else None,
    )
