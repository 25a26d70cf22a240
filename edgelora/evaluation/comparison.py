"""Better, worse or the same: row by row, and over all rows with the interval of the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelora.evaluation.bootstrap import RESAMPLES, Difference, Interval, RowSums, difference, intervals
from edgelora.evaluation.metrics import Metric
from edgelora.evaluation.variants import Variant

BETTER, WORSE, SAME = "better", "worse", "same"
MISSING = ""
"""Of a row that has no value in one of the two."""


@dataclass(frozen=True)
class Comparison:
    """A variant beside its reference, by one metric.

    Attributes:
        difference: variant less reference, in the metric's own direction.
        verdict: `SAME` where the interval of the difference has 0 in it.
        by_row: for each row `BETTER`, `WORSE`, `SAME` or `MISSING`.
    """

    reference: str
    difference: Difference
    verdict: str
    by_row: tuple[str, ...]

    def count(self, which: str) -> int:
        return self.by_row.count(which)

    def to_dict(self) -> dict[str, Any]:
        counts = {name: self.count(name) for name in (BETTER, WORSE, SAME)}
        return {
            "reference": self.reference,
            "difference": self.difference.interval.to_dict(),
            "p_more": self.difference.p_more,
            "rows": self.difference.n_rows,
            "verdict": self.verdict,
            **counts,
        }


@dataclass(frozen=True)
class Measured:
    """One metric of one variant.

    Attributes:
        n_rows: rows that have a value.
        comparison: None for what has no reference, and for metrics that are comparisons themselves.
    """

    metric: Metric
    interval: Interval
    n_rows: int
    by_row: tuple[float | None, ...]
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        compared = {"compared": self.comparison.to_dict()} if self.comparison else {}
        return {**self.interval.to_dict(), "rows": self.n_rows, **compared}


def measure(
    metric: Metric,
    variants: Sequence[Variant],
    sums: Mapping[str, RowSums],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Measured]:
    """One metric of every variant that has a value.

    Args:
        sums: by variant's name.
    """
    present = [variant for variant in variants if sums[variant.name].present.any()]
    found = intervals([sums[variant.name] for variant in present], seed=seed, resamples=resamples) if present else []
    measured = {}
    for variant, interval in zip(present, found, strict=True):
        own, other = sums[variant.name], sums.get(variant.reference)
        compared = None
        if other is not None and (own.present & other.present).any() and metric.looks_at != "divergence":
            compared = compare(metric, own, other, variant.reference, seed=seed, resamples=resamples)
        values = tuple(float(value) if np.isfinite(value) else None for value in _rows(metric, own, shown=True))
        measured[variant.name] = Measured(metric, interval, int(own.present.sum()), values, compared)
    return measured


def compare(
    metric: Metric, own: RowSums, other: RowSums, reference: str, *, seed: int = 0, resamples: int = RESAMPLES
) -> Comparison:
    """A variant with its reference."""
    found = difference(own, other, seed=seed, resamples=resamples)
    sign = -1.0 if metric.is_lower_better else 1.0
    less = sign * (_rows(metric, own) - _rows(metric, other))
    by_row = tuple(
        MISSING if np.isnan(value) else BETTER if value > metric.same else WORSE if value < -metric.same else SAME
        for value in less
    )
    low, high = found.interval.low, found.interval.high
    verdict = SAME if not (low > 0 or high < 0) else BETTER if (low > 0) != metric.is_lower_better else WORSE
    return Comparison(reference, found, verdict, by_row)


def _rows(metric: Metric, sums: RowSums, *, shown: bool = False) -> Any:
    """Each row's ratio of sums, as a reader is `shown` it: transformed. NaN where a row has none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = sums.above / sums.below
    return metric.transform(ratio) if shown else ratio
