"""Embeddings and the output, where an adapter holds both: whether they are tied, and were trained alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from converters.checkpoint import Tensors

# Embeddings to the output that may be tied to them.
OUTPUTS = {"embed_tokens": "lm_head", "wte": "lm_head", "word_embeddings": "lm_head", "embed_in": "embed_out"}
BLOCK_ROWS = 4096  # read at once


def alike(tensors: Tensors, stored: Mapping[str, str]) -> set[str]:
    """Modules of embeddings and outputs that are stored with the same values.

    Args:
        stored: a module's name to its tensor's.
    """
    outputs = {short_name(module): module for module in stored if short_name(module) in OUTPUTS.values()}
    pairs = [(module, outputs[OUTPUTS[name]]) for module in stored
             if (name := short_name(module)) in OUTPUTS and OUTPUTS[name] in outputs]  # fmt: skip
    same = (pair for pair in pairs if _same_values(tensors, *(stored[module] for module in pair)))
    return {module for pair in same for module in pair}


def short_name(module: str) -> str:
    return module.rpartition(".")[2]


def _same_values(tensors: Tensors, first: str, second: str) -> bool:
    one, other = tensors.tensors[first], tensors.tensors[second]
    if one.shape != other.shape or one.dtype != other.dtype or len(one.shape) != 2:
        return False
    for start in range(0, one.shape[0], BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, one.shape[0])
        if not np.array_equal(tensors.rows(first, start, stop), tensors.rows(second, start, stop)):
            return False
    return True
