"""An adapter tried before anybody is served with it: weights that are numbers may still make the base overflow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from edgelora.engine.context import Context
from edgelora.engine.low_rank import Weights
from edgelora.engine.mixing import make_mixer
from edgelora.engine.model import Model

TOKENS = 4
"""Of the trial's text: weights that overflow do so on nearly every token, and replies under way pause meanwhile."""


def gives_numbers(model: Model, weights: Weights | None, pointer: Any, scale: float, threads: int) -> bool:
    """Whether the logits of a few tokens are numbers with an adapter; also where they are none on the bare base, for
    then it is not the adapter's fault. It has a context of its own, and takes about as long as `TOKENS` tokens.

    Args:
        weights: to be computed as in a mixed decode; None where llama.cpp applies its own adapter, at `pointer`.

    Raises:
        EdgeloraError: no room for the context, or llama.cpp failed.
    """
    with ExitStack() as undo:
        mixer = make_mixer(model, TOKENS) if weights else None
        if mixer:
            undo.callback(mixer.close)
        callback = mixer.callback if mixer else None
        context = Context(model, n_ctx=16, n_sequences=1, threads=threads, n_batch=TOKENS, callback=callback)
        undo.callback(context.close)

        def mixed() -> None:
            assert mixer is not None
            assert weights is not None
            own = Weights(weights.pairs)  # `Weights.native` belongs to one mixer
            mixer.plug(own)
            runs = [(TOKENS, ((own, scale),))]
            mixer.fill(runs, runs)
            context.apply(((mixer.socket, 1.0),))

        def bare() -> None:
            if mixer:
                mixer.stand_aside()
            context.apply(())

        tried = mixed if mixer else lambda: context.apply(((pointer, scale),))
        return _has_numbers(context, tried) or not _has_numbers(context, bare)


def _has_numbers(context: Context, apply: Callable[[], None]) -> bool:
    """Whether every row has a finite highest logit: single ones may be minus infinity (`sampler.draw`)."""
    context.trim(0, 0)
    apply()
    tokens = [(at + 1) * context.n_vocab // (TOKENS + 1) for at in range(TOKENS)]
    context.decode(0, tokens, 0, every=True)
    return bool(np.isfinite(context.all_logits(TOKENS).max(axis=1)).all())
