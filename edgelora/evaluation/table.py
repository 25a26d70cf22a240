"""What an evaluation found, as the lines of tables: on the screen and on the page."""

from __future__ import annotations

from collections.abc import Iterator

from edgelora.evaluation.comparison import BETTER, SAME, WORSE, Comparison, Measured
from edgelora.evaluation.evaluate import Evaluation
from edgelora.evaluation.metrics import Metric
from edgelora.evaluation.variants import Variant

_CUT = "length"
"""The finish reason of a reply that ended at the limit of tokens."""


def n_cut(found: Evaluation, variant: Variant) -> int:
    """How many of a variant's replies ended at the limit of tokens."""
    return sum(answer.finish_reason == _CUT for answer in found.answers[variant.name])


def table(found: Evaluation) -> Iterator[tuple[Metric, list[list[str]]]]:
    """For each metric a line for each variant: name, value, interval, difference, its interval, verdict, rows better,
    worse and the same."""
    for metric in found.metrics:
        measured = found.measured[metric.name]
        lines = [
            [variant.name, *shown_value(measured[variant.name]), *shown_comparison(measured[variant.name])]
            for variant in found.variants
            if variant.name in measured
        ]
        if lines:
            yield metric, lines


def shown_value(measured: Measured) -> list[str]:
    """The value and its interval."""
    metric, interval = measured.metric, measured.interval
    return [metric.shown(interval.value), f"[{metric.shown(interval.low)}, {metric.shown(interval.high)}]"]


def shown_comparison(measured: Measured) -> list[str]:
    """The difference, its interval, the verdict and the counts of rows; empty where nothing is compared."""
    metric, compared = measured.metric, measured.comparison
    if compared is None:
        return ["", "", "", ""]
    interval = compared.difference.interval
    low, high = metric.shown(interval.low, signed=True), metric.shown(interval.high, signed=True)
    return [metric.shown(interval.value, signed=True), f"[{low}, {high}]", compared.verdict, counts(compared)]


def counts(compared: Comparison) -> str:
    """ "12 better, 3 worse, 85 same"."""
    return ", ".join(f"{compared.count(each):,} {each}" for each in (BETTER, WORSE, SAME))
