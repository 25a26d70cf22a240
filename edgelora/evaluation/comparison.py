"""Better, worse or the same: row by row, and over all rows with the interval of the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgelora.evaluation.bootstrap import (
    RESAMPLES,
    Difference,
    Floats,
    Interval,
    RowSums,
    difference,
    interval,
    pair,
    resampled,
)
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


@dataclass(frozen=True)
class _Case:
    """One metric of one variant, with the places of its sums, and of those of both in its pair, in one long list."""

    metric: Metric
    variant: Variant
    own: int
    pair: tuple[int, int] | None


def measure(
    metrics: Sequence[Metric],
    variants: Sequence[Variant],
    sums: Mapping[str, Mapping[str, RowSums]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, dict[str, Measured]]:
    """Every metric of every variant that has a value, all on the same resamples: metric's name to variant's name to
    what was measured.

    Args:
        sums: by metric's name and variant's name.
    """
    flat: list[RowSums] = []
    cases: list[_Case] = []
    for metric in metrics:
        by_variant = sums[metric.name]
        for variant in variants:
            own, other = by_variant[variant.name], _other(metric, by_variant, variant)
            if not own.present.any():
                continue
            is_pair = other is not None and (own.present & other.present).any() and metric.looks_at != "divergence"
            cases.append(_Case(metric, variant, len(flat), (len(flat) + 1, len(flat) + 2) if is_pair else None))
            flat += [own, *(pair(own, other) if other is not None and is_pair else ())]
    drawn = resampled(flat, seed=seed, resamples=resamples) if flat else []
    measured: dict[str, dict[str, Measured]] = {metric.name: {} for metric in metrics}
    for case in cases:
        measured[case.metric.name][case.variant.name] = _measured(case, flat, drawn)
    return measured


def _other(metric: Metric, by_variant: Mapping[str, RowSums], variant: Variant) -> RowSums | None:
    """What a variant is compared with; None for what has no reference."""
    own, found = by_variant[variant.name], by_variant.get(variant.reference)
    if found is None or metric.beside is None:
        return found
    return RowSums(np.where(own.present, metric.beside, np.nan), np.where(own.present, 1.0, np.nan), own.transform)


def _measured(case: _Case, flat: Sequence[RowSums], drawn: Sequence[Floats]) -> Measured:
    metric, own = case.metric, flat[case.own]
    compared = None
    if case.pair:
        one, other = case.pair
        found = difference(flat[one], flat[other], drawn[one], drawn[other])
        compared = _comparison(metric, case.variant.reference, flat[one], flat[other], found)
    values = tuple(float(value) if np.isfinite(value) else None for value in _rows(metric, own, shown=True))
    return Measured(metric, interval(own, drawn[case.own]), int(own.present.sum()), values, compared)


def compare(
    metric: Metric, own: RowSums, other: RowSums, reference: str, *, seed: int = 0, resamples: int = RESAMPLES
) -> Comparison:
    """A variant with its reference, by one metric."""
    one, two = pair(own, other)
    found = difference(one, two, *resampled([one, two], seed=seed, resamples=resamples))
    return _comparison(metric, reference, one, two, found)


def _comparison(metric: Metric, reference: str, own: RowSums, other: RowSums, found: Difference) -> Comparison:
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
