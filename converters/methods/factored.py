"""Changes that are a product of two thin matrices, or a sum that no two thin matrices give."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from converters.checkpoint import Floats
from converters.methods.changes import Change, LowRank, Transformed

Loaded = TypeVar("Loaded")


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
        return LowRank(tensor, shape, rank, scale, load)
    return added(tensor, shape, rows_of_change)


def added(tensor: str, shape: tuple[int, int], rows_of_change: Callable[[int, int], Floats]) -> Transformed:
    """W + change, whatever W is."""
    return Transformed(
        tensor, shape, lambda rows, start: rows + rows_of_change(start, start + len(rows)), uses_weight=False
    )


def recent(load: Callable[[], Loaded]) -> Loaded:
    """What `load` gives, kept while the rows of one matrix are asked for range by range, by several threads."""
    found: Loaded = _recent(load)
    return found


@lru_cache(maxsize=4)
def _recent(load: Callable[[], Loaded]) -> Loaded:
    return load()
