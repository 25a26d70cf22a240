"""DoRA (arXiv:2402.09353), LoRA with `use_dora`: every output of W + scale * B @ A is given a trained length.

    linear layers   W' = m * V / |V|, V = W + scale * B @ A, lengths of its rows; m (rows,)
    embeddings      the same of the transposed weight: lengths of the columns, over the vocabulary; m (embedding,)

PEFT's names: <module>.lora_magnitude_vector, and <module>.lora_magnitude_vector.weight as some tools write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import quiet, recent
from converters.methods.lora import check_pair, scale_of
from converters.methods.method import Module, scaled


def read(module: Module) -> Iterator[Change]:
    is_embedding = "embedding_a" in module or "embedding_b" in module
    a, b = ("embedding_a", "embedding_b") if is_embedding else ("a", "b")
    check_pair(module, a, b)
    outputs, inputs = module.shape(b)[0], module.shape(a)[1]
    if "magnitude" not in module or module.shape("magnitude") != (outputs,):
        found = module.shape("magnitude") if "magnitude" in module else "none"
        raise ModuleProblem(f"DoRA's magnitude vector must be ({outputs},), and is {found}")
    yield _embedding(module, (inputs, outputs)) if is_embedding else _linear(module, (outputs, inputs))


def _linear(module: Module, shape: tuple[int, int]) -> Transformed:
    scale = scale_of(module)

    def load() -> tuple[Floats, Floats, Floats]:
        return scaled(module.load("b"), scale), module.load("a"), module.load("magnitude")

    return with_lengths(module.weight, shape, load)


def with_lengths(tensor: str, shape: tuple[int, int], load: Callable[[], tuple[Floats, Floats, Floats]]) -> Transformed:
    """The rows of W + B @ A at given lengths.

    Args:
        load: B with its scale (rows, rank), A (rank, columns) and the lengths (rows,).
    """

    @quiet
    def apply(weight: Floats, start: int) -> Floats:
        b, a, magnitude = recent(load)
        where = slice(start, start + len(weight))
        changed = weight + b[where] @ a
        length = np.sqrt(np.einsum("ij,ij->i", changed, changed, dtype=np.float64))
        return _times(changed, (magnitude[where] / length)[:, None])

    return Transformed(tensor, shape, apply)


def _embedding(module: Module, shape: tuple[int, int]) -> Transformed:
    scale = scale_of(module)

    @quiet
    def apply(weight: Floats, start: int) -> Floats:
        changed = weight + scaled(module.load("embedding_a").T, scale) @ module.load("embedding_b").T
        length = np.sqrt(np.einsum("ij,ij->j", changed, changed, dtype=np.float64))
        return _times(changed, module.load("magnitude") / length)

    return Transformed(module.weight, shape, apply, by_rows=False)


def _times(values: Floats, factors: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Floats:
    values *= factors.astype(np.float32)
    return values
