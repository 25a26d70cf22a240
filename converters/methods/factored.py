"""Changes that are a product of two thin matrices, or a sum that no two thin matrices give."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, LowRank, Transformed

Loaded = TypeVar("Loaded")
quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")  # infinite values are refused by name


def factored(
    tensor: str,
    shape: tuple[int, int],
    rank: int,
    scale: float,
    load: Callable[[], tuple[Floats, Floats]],
    rows_of_change: Callable[[int, int], Floats],
) -> Change:
    """W + B @ A where B and A are thinner than W; otherwise the same sum, row by row.

    Args:
        load: B (rows, rank) and A (rank, columns), with the scale.
        rows_of_change: first and last row to those of B @ A, float32.
    """
    if rank < min(shape):
        return LowRank(tensor, shape, rank, scale, quiet(load))
    return added(tensor, shape, rows_of_change)


def added(tensor: str, shape: tuple[int, int], rows_of_change: Callable[[int, int], Floats]) -> Transformed:
    """W + change, whatever W is."""

    @quiet
    def apply(rows: Floats, start: int) -> Floats:
        return rows + rows_of_change(start, start + len(rows))

    return Transformed(tensor, shape, apply, uses_weight=False)


def recent(load: Callable[[], Loaded]) -> Loaded:
    """What `load` gives, kept while the rows of one matrix are asked for range by range, by several threads."""
    found: Loaded = _recent(load)
    return found


@lru_cache(maxsize=4)
def _recent(load: Callable[[], Loaded]) -> Loaded:
    return load()
