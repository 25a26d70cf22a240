"""Sampler chains, in llama.cpp's own order: penalties, top-k, top-p, min-p, temperature, then the draw."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence
from typing import Any

from edgelora.engine.native import Handle, llama
from edgelora.errors import ModelFileError
from edgelora.sampling import Sampling

PENALTY_WINDOW = 64
MIN_TEMPERATURE = 1e-6  # below, logits divided by it overflow float32: that is greedy
RANDOM_SEED = 2**32 - 1  # LLAMA_DEFAULT_SEED: llama.cpp draws its own


class Sampler:
    """Draws tokens from the context's last logits. Close it after use.

    Args:
        history: tokens the repeat penalty has seen already: the prompt.
    """

    def __init__(self, sampling: Sampling, n_vocab: int, history: Sequence[int]) -> None:
        library = llama()
        chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
        self._handle = Handle(chain, library.llama_sampler_free)
        for link in _links(sampling, n_vocab):
            library.llama_sampler_chain_add(chain, link)
        for token in history[-PENALTY_WINDOW:]:
            library.llama_sampler_accept(chain, token)
        self._sample = library.llama_sampler_sample

    def draw(self, context: Any, logits: Any, row: int) -> int:
        """The next token, from `logits`, those of a row of the native `context`'s last decode.

        Raises:
            ModelFileError: the logits are not numbers, so there is nothing to draw from.
        """
        if logits[0] != logits[0]:
            raise ModelFileError(
                "the model's output is not a number (NaN)",
                hint="Its weights or its adapter's are damaged, or the scale is too large.",
            )
        return int(self._sample(self._handle.pointer, context, row))

    def close(self) -> None:
        self._handle.close()


def _links(sampling: Sampling, n_vocab: int) -> list[Any]:
    library, links = llama(), []
    if sampling.repeat_penalty != 1.0:
        links.append(library.llama_sampler_init_penalties(n_vocab, PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0))
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
