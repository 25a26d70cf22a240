"""Confidence intervals by resampling rows: of a value, and of the difference between two variants on the same rows.

Paired, as in Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation"
(https://aclanthology.org/W04-3250): a resample draws as many rows as there are, with replacement, and every variant and
metric is computed on the same draw. Intervals are the percentiles of what comes out.

A metric is a ratio of sums over rows, perhaps transformed: a mean is sum(score) / sum(1), perplexity is
exp(sum(losses) / sum(tokens)). So a draw needs no more than how often it has each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 2000
COVERAGE = 0.95
ENTRIES_AT_ONCE = 1 << 22
"""Row counts of resamples that are in memory at a time: 32 MiB of float64."""
LEAST_ROWS = 2
"""Of fewer, every draw is the same, and an interval would be a point: it is not known."""
_identity: Callable[[Floats], Floats] = np.asarray


@dataclass(frozen=True)
class RowSums:
    """A metric on every row: what is summed, float64 (n,) each; a row without a value has NaN in both.

    Attributes:
        transform: of the ratio of both sums.
    """

    above: Floats
    below: Floats
    transform: Callable[[Floats], Floats] = _identity

    @property
    def value(self) -> float:
        """Over all rows that have one; NaN where none has."""
        below = np.nansum(self.below)
        return float(self.transform(np.array(np.nansum(self.above) / below))) if below else float("nan")

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        return np.isfinite(self.below)


@dataclass(frozen=True)
class Interval:
    """A number and where it lies with 95 % confidence; NaN for what is not known."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """As JSON, which has no NaN and no infinities: null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if np.isfinite(number) else None for name, number in numbers.items()}


@dataclass(frozen=True)
class Difference:
    """How much a variant has more than another, on the rows that both have.

    Attributes:
        p_more: the share of resamples in which it has more (ties count half).
        n_rows: rows that both have.
    """

    interval: Interval
    p_more: float
    n_rows: int


def resampled(sums: Sequence[RowSums], *, seed: int = 0, resamples: int = RESAMPLES) -> list[Floats]:
    """Each metric on each resample, float64 (resamples,); all of the same rows, on the same draws.

    The draws depend on nothing but the seed and the numbers of rows and resamples.
    """
    n_rows = len(sums[0].above)
    columns = np.stack([np.nan_to_num(part) for each in sums for part in (each.above, each.below)], axis=1)
    rng, totals = np.random.default_rng(seed), np.empty((resamples, columns.shape[1]))
    step = max(1, ENTRIES_AT_ONCE // max(1, n_rows))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        rows = rng.integers(0, n_rows, (count, n_rows)) + np.arange(count)[:, None] * n_rows
        times = np.bincount(rows.ravel(), minlength=count * n_rows).reshape(count, n_rows).astype(np.float64)
        totals[start : start + count] = times @ columns
    with np.errstate(invalid="ignore", divide="ignore"):
        return [
            np.asarray(each.transform(totals[:, 2 * at] / totals[:, 2 * at + 1]), np.float64)
            for at, each in enumerate(sums)
        ]


def interval(sums: RowSums, values: Floats) -> Interval:
    """Of a metric, from its `values` on resamples; without bounds (NaN) below `LEAST_ROWS`."""
    return Interval(sums.value, *_bounds(values, int(sums.present.sum())))


def pair(one: RowSums, other: RowSums) -> tuple[RowSums, RowSums]:
    """Both, on the rows where both have a value."""
    both = one.present & other.present
    return _masked(one, both), _masked(other, both)


def difference(one: RowSums, other: RowSums, values: Floats, others: Floats) -> Difference:
    """`one` less `other`, both of a `pair`, from what they are on the same resamples."""
    less = values - others
    p_more = float((less > 0).mean() + (less == 0).mean() / 2)
    n_rows = int(one.present.sum())
    return Difference(Interval(one.value - other.value, *_bounds(less, n_rows)), p_more, n_rows)


def _masked(sums: RowSums, rows: npt.NDArray[np.bool_]) -> RowSums:
    return RowSums(np.where(rows, sums.above, np.nan), np.where(rows, sums.below, np.nan), sums.transform)


def _bounds(values: Floats, n_rows: int) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if n_rows < LEAST_ROWS or not finite.size:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
