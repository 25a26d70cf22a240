"""Sampler chains, in llama.cpp's own order: biases, penalties, top-k, top-p, min-p, temperature, then the draw."""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelora.engine.grammar import CANDIDATE, Candidates, Grammar, apply
from edgelora.engine.native import Handle, llama
from edgelora.engine.tokenizer import Tokenizer
from edgelora.errors import EdgeloraError, ModelFileError, SettingsError
from edgelora.sampling import Sampling
from edgelora.tools.use import ToolUse

MIN_TEMPERATURE = 1e-6  # below, logits divided by it overflow float32: that is greedy
RANDOM_SEED = 2**32 - 1  # LLAMA_DEFAULT_SEED: llama.cpp draws its own


class Sampler:
    """Draws tokens from the context's last logits. Close it after use.

    Args:
        history: tokens the penalties have seen already: the prompt.
        ends: tokens that end the reply; a grammar lets them come where it is satisfied.
        tools: what the reply may call: a grammar lets the markers of calls come where it has their text.

    Raises:
        SettingsError: a token that the base does not have, or a grammar that llama.cpp refuses.
        ModelFileError: a base whose replies cannot end under a grammar.
    """

    def __init__(
        self,
        sampling: Sampling,
        tokenizer: Tokenizer,
        history: Sequence[int],
        ends: Collection[int] = (),
        tools: ToolUse | None = None,
    ) -> None:
        self._n_vocab = tokenizer.size
        if unknown := sorted(token for token in sampling.logit_bias if token >= self._n_vocab):
            raise SettingsError(f"logit_bias of tokens {unknown}; this base has {self._n_vocab} tokens")
        grammar = sampling.gbnf
        self._grammar = None if grammar is None else _grammar(grammar, tokenizer, ends, tools)
        library = llama()
        chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        self._handle = Handle(chain, library.llama_sampler_free)
        links = _links(sampling, tokenizer)
        # A greedy choice alone: llama.cpp would copy every logit first, a quarter of a millisecond a token.
        self._takes_best = len(links) == 1 and sampling.temperature < MIN_TEMPERATURE
        for link in links:
            library.llama_sampler_chain_add(chain, link)
        for token in history[max(0, len(history) - sampling.repeat_last_n) :]:
            library.llama_sampler_accept(chain, token)
        self._sample = library.llama_sampler_sample

    def draw(self, context: Any, logits: Any, row: int) -> int:
        """The next token, from `logits`, those of a row of the native `context`'s last decode.

        Raises:
            ModelFileError: the logits are not numbers, so there is nothing to draw from.
            EdgeloraError: there is no token that the grammar allows.
        """
        values = np.ctypeslib.as_array(logits, (self._n_vocab,))
        best = int(values.argmax())  # of a NaN, where one is; tokens that are suppressed are minus infinity
        largest = float(values[best])
        if math.isnan(largest) or math.isinf(largest):
            raise ModelFileError(
                f"the model's output is not a number ({'NaN' if math.isnan(largest) else 'infinite'})",
                hint="Its weights or its adapter's are damaged, or the scale is too large.",
            )
        if self._takes_best and self._grammar is None:
            return best
        if self._grammar is None:
            return int(self._sample(self._handle.pointer, context, row))
        return self._draw_within(self._grammar, values)

    def close(self) -> None:
        self._handle.close()
        if self._grammar is not None:
            self._grammar.close()

    def _draw_within(self, grammar: Grammar, logits: npt.NDArray[np.float32]) -> int:
        """Draw as if there were no grammar, and again among what it allows only if it refuses that: asking about all
        tokens takes long (common_sampler_sample, llama.cpp's common/sampling.cpp)."""
        token = self._choose(_candidates(logits))
        if not grammar.allows(token):
            allowed = grammar.restrict(_candidates(logits))
            while not grammar.is_text(token := self._choose(allowed.copy())):
                allowed = allowed[allowed["id"] != token]
        llama().llama_sampler_accept(self._handle.pointer, token)
        grammar.accept(token)
        return token

    def _choose(self, candidates: Candidates) -> int:
        if not len(candidates):
            raise EdgeloraError("the grammar wants characters that this base's vocabulary cannot write")
        array = apply(self._handle.pointer, candidates)
        return int(array.data[array.selected].id)


def _grammar(text: str, tokenizer: Tokenizer, ends: Collection[int], tools: ToolUse | None) -> Grammar:
    if tools is None:
        return Grammar(text, tokenizer, ends)
    return Grammar(text, tokenizer, ends, tools.markers, frees_controls=tools.is_free)


def log_probabilities(logits: npt.NDArray[np.float32], tokens: Sequence[int]) -> list[float]:
    """Natural logarithms of the tokens' probabilities, before any sampler; `logits` is (n_vocab,)."""
    highest = float(logits.max())
    total = highest + float(np.log(np.exp(logits - np.float32(highest)).sum(dtype=np.float64)))
    return [float(logits[token]) - total for token in tokens]


def likeliest(logits: npt.NDArray[np.float32], count: int) -> list[int]:
    """The `count` tokens with the highest logits, the best first."""
    count = min(count, len(logits))
    best = np.argpartition(-logits, count - 1)[:count] if count else np.empty(0, np.int64)
    return [int(token) for token in best[np.lexsort((best, -logits[best]))]]


def _candidates(logits: npt.NDArray[np.float32]) -> Candidates:
    candidates = np.zeros(len(logits), CANDIDATE)
    candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
    return candidates


def _links(sampling: Sampling, tokenizer: Tokenizer) -> list[Any]:
    library, links = llama(), []
    if biases := {**sampling.logit_bias, **dict.fromkeys(_suppressed(tokenizer.vocab), -np.inf)}:
        array = (library.llama_logit_bias * len(biases))(*biases.items())
        links.append(library.llama_sampler_init_logit_bias(tokenizer.size, len(biases), array))
    penalties = sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
    if penalties != (1.0, 0.0, 0.0) and sampling.repeat_last_n:
        links.append(library.llama_sampler_init_penalties(tokenizer.size, sampling.repeat_last_n, *penalties))
    if sampling.temperature < MIN_TEMPERATURE:
        return [*links, library.llama_sampler_init_greedy()]
    if sampling.top_k:
        links.append(library.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        links.append(library.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        links.append(library.llama_sampler_init_min_p(sampling.min_p, 1))
    seed = secrets.randbelow(RANDOM_SEED) if sampling.seed is None else sampling.seed % RANDOM_SEED
    return [
        *links,
        library.llama_sampler_init_temp(sampling.temperature),
        library.llama_sampler_init_dist(ctypes.c_uint32(seed)),
    ]


def _suppressed(vocab: Any) -> list[int]:
    """Tokens that the base's own file says are never to be drawn (`tokenizer.ggml.suppress_tokens`)."""
    count = ctypes.c_int32()
    tokens = llama().llama_vocab_get_suppress_tokens(vocab, ctypes.byref(count))
    return [int(tokens[index]) for index in range(count.value)]
