"""KaSA (arXiv:2412.06071), LoRA with `kasa_config`: the base without its smallest singular values, and a change.

W' = W - (its `r` smallest singular components) + scale * B @ diag(d) @ A

PEFT's name of d (rank,): <module>.lora_diag. It cuts the base when the adapter is made, so that the file tells of it
in its configuration only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import quiet
from converters.methods.lora import check_pair, scale_of
from converters.methods.method import Module, scaled

CHUNK = 1024


def read(module: Module) -> Iterator[Change]:
    check_pair(module)
    (rank, columns), (rows, _) = module.shape("a"), module.shape("b")
    if "diagonal" not in module or module.shape("diagonal") != (rank,):
        found = module.shape("diagonal") if "diagonal" in module else "none"
        raise ModuleProblem(f"KaSA's diagonal must be ({rank},), and is {found}")
    if rank >= min(rows, columns):
        raise ModuleProblem(f"KaSA takes {rank} of {min(rows, columns)} singular values away, and leaves none")
    scale = scale_of(module)

    @quiet
    def apply(weight: Floats, start: int) -> Floats:
        changed = without_smallest(weight, rank)
        changed += scaled(module.load("b") * module.load("diagonal"), scale) @ module.load("a")
        return changed

    yield Transformed(module.weight, (rows, columns), apply, by_rows=False)


def without_smallest(weight: Floats, count: int) -> Floats:
    """A copy without its `count` smallest singular components, found on its shorter side in float64."""
    if weight.shape[0] < weight.shape[1]:
        return np.ascontiguousarray(_without(weight.T, count).T)
    return _without(weight, count)


def _without(tall: Floats, count: int) -> Floats:
    gram = np.zeros((tall.shape[1], tall.shape[1]), np.float64)
    for start in range(0, len(tall), CHUNK):
        part = tall[start : start + CHUNK].astype(np.float64)
        gram += part.T @ part
    smallest = _smallest(gram, count)
    found = np.empty(tall.shape, np.float32)
    for start in range(0, len(tall), CHUNK):
        part = tall[start : start + CHUNK].astype(np.float64)
        found[start : start + CHUNK] = part - (part @ smallest) @ smallest.T
    return found


def _smallest(gram: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Right singular vectors (columns, count) of the smallest values; zeros for a base that holds no numbers."""
    if not np.isfinite(gram).all():  # refused by name, with its infinite values
        return np.zeros((len(gram), count), np.float64)
    vectors: npt.NDArray[np.float64] = np.linalg.eigh(gram)[1]  # ascending
    return vectors[:, :count]
