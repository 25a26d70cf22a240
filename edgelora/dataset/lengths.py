"""Lengths of rows in tokens: four bytes each, their spread, and a histogram of a few lines."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

N_BUCKETS = 10
ALMOST_ALL = 0.99
_STEPS = (1, 2, 5)


@dataclass(frozen=True)
class Bucket:
    """So many rows have `low` to `high` tokens; the last bucket has no end (None)."""

    low: int
    high: int | None
    rows: int


@dataclass(frozen=True)
class Spread:
    """How long rows are, in tokens."""

    rows: int
    total: int
    smallest: int
    median: int
    p95: int
    largest: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def spread(lengths: array[int]) -> Spread:
    """Args:
    lengths: one or more.
    """
    values = np.array(lengths, dtype=np.int64)
    median, p95 = (int(value) for value in np.percentile(values, (50, 95), method="nearest"))
    return Spread(len(values), int(values.sum()), int(values.min()), median, p95, int(values.max()))


def histogram(lengths: array[int]) -> list[Bucket]:
    """About `N_BUCKETS` buckets of one width, a round number, that hold almost all rows; one more for longer ones."""
    values = np.array(lengths, dtype=np.int64)
    enough = float(np.quantile(values, ALMOST_ALL))
    width = _round_up((enough + 1) / N_BUCKETS)
    n_buckets = int(enough // width) + 1
    counts = np.bincount(np.minimum(values // width, n_buckets), minlength=n_buckets + 1)
    first = int(np.argmax(counts > 0))
    buckets = [Bucket(i * width, (i + 1) * width - 1, int(counts[i])) for i in range(first, n_buckets)]
    longer = int(counts[n_buckets])
    return [*buckets, Bucket(n_buckets * width, None, longer)] if longer else buckets


def _round_up(value: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is no smaller."""
    scale = 1
    while True:
        for step in _STEPS:
            if step * scale >= value:
                return step * scale
        scale *= 10
