"""Vectors of texts, from bases that were made to give them (their file says how tokens become one: `pooling_type`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgelora.engine.context import Applied, Context
from edgelora.engine.model import Model
from edgelora.engine.native import llama
from edgelora.errors import ContextOverflowError, SettingsError

NONE, RANK = 0, 4  # enum llama_pooling_type, llama.h


def pooling_type(model: Model) -> int:
    """How a base makes one vector of many, in `enum llama_pooling_type`.

    Raises:
        SettingsError: it was not made for embeddings.
    """
    found = int(model.header.metadata.get(f"{model.architecture}.pooling_type", NONE))
    if found in (NONE, RANK):
        raise SettingsError(f"{model.name} is not a base for embeddings: its file names no pooling of tokens")
    return found


class Embedder:
    """A context of its own for whole texts. Lives on the engine's thread.

    Args:
        n_ctx: the most tokens of a text.

    Raises:
        SettingsError: see `pooling_type`.
        EdgeloraError: not enough memory.
    """

    def __init__(self, model: Model, n_ctx: int, threads: int) -> None:
        pooling_type(model)
        self._n_ctx, self._size = n_ctx, int(llama().llama_model_n_embd_out(model.pointer))
        # A text is one batch: attention may look both ways.
        self._context = Context(model, n_ctx=n_ctx, n_sequences=1, threads=threads, n_batch=n_ctx, embeddings=True)

    def embed(self, tokens: Sequence[int], applied: Applied) -> npt.NDArray[np.float32]:
        """The vector of a text, of length 1, float32 (n_embd,).

        Raises:
            ContextOverflowError: it is too long.
            EdgeloraError: llama.cpp failed, with its reason.
        """
        if len(tokens) > self._n_ctx:
            raise ContextOverflowError(
                f"the text is {len(tokens)} tokens long; this context window has {self._n_ctx}", hint="Shorten it."
            )
        self._context.apply(applied)
        self._context.trim(0, 0)
        self._context.decode(0, tokens, 0, every=True)
        pointer = llama().llama_get_embeddings_seq(self._context.pointer, 0)
        vector = np.ctypeslib.as_array(pointer, (self._size,)).astype(np.float64)
        return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)

    def release(self) -> None:
        """Let go of the adapters that are set."""
        self._context.apply(())

    def close(self) -> None:
        self._context.close()
