"""The page of an evaluation: one HTML file that needs nothing else, light and dark, with the rows that changed."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from edgelora.evaluation.comparison import BETTER, SAME, WORSE, Comparison, Measured
from edgelora.evaluation.evaluate import Evaluation
from edgelora.evaluation.labels import NO_LABEL
from edgelora.evaluation.metrics import Metric
from edgelora.evaluation.table import counts, n_cut, shown_comparison, shown_value
from edgelora.evaluation.variants import Variant
from edgelora.report_page import render_page

MAX_ROWS = 25
"""Rows of each kind (worse, better, reworded) that a comparison shows; rows.jsonl has all."""
MAX_LABELS = 12
"""Labels that a confusion matrix has room for; of more, the most frequent mistakes are shown."""
MAX_MISTAKES, MAX_FIELDS = 15, 60
MAX_WORDS, LEAST_ALIKE = 1500, 0.35
"""Differences are marked between replies of at most so many words, that have such a share of them in common."""
LOG_FROM = 10.0
"""A chart has a logarithmic axis where its largest value is so many times the smallest."""
REWORDED = "reworded"
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_ORDER = (WORSE, BETTER, REWORDED)


@dataclass(frozen=True)
class Span:
    """A piece of a reply, and whether the other one lacks it."""

    text: str
    is_changed: bool


@dataclass(frozen=True)
class Line:
    """A variant in the chart of a metric; `low`, `value` and `high` are per cent of the chart's width."""

    name: str
    cells: Sequence[str]
    verdict: str
    low: float
    value: float
    high: float


@dataclass(frozen=True)
class Chart:
    """A metric: a line for each variant, on one axis."""

    metric: Metric
    lines: Sequence[Line]

    @property
    def compares(self) -> bool:
        return any(line.verdict for line in self.lines)


@dataclass(frozen=True)
class Side:
    """One of two replies; an empty one is a span without text."""

    name: str
    spans: Sequence[Span]
    values: Sequence[str]


@dataclass(frozen=True)
class ChangedRow:
    """A row on which a variant and its reference differ; `kind` is `BETTER`, `WORSE` or `REWORDED`."""

    line: int
    kind: str
    question: str
    reference: str
    sides: tuple[Side, Side]


@dataclass(frozen=True)
class Changes:
    """The rows on which a variant differs from its reference.

    Attributes:
        by: the metric that says which ones are better.
        counts: "12 better, 3 worse, 85 same".
        totals: kind and how many rows there are of it.
    """

    name: str
    reference: str
    by: str
    counts: str
    totals: Sequence[tuple[str, int]]
    rows: Sequence[ChangedRow]

    @property
    def n_changed(self) -> int:
        return sum(count for _, count in self.totals)


def render_report(found: Evaluation, when: datetime | None = None) -> str:
    """The page as text."""
    return render_page(
        "edgelora.evaluation",
        "report.html",
        trim_blocks=True,
        title=Path(found.data).name,
        data=found.data,
        when=f"{when or datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        n_rows=len(found.rows),
        variants=[(variant, n_cut(found, variant)) for variant in found.variants],
        charts=[chart for metric in found.metrics if (chart := _chart(found, metric)).lines],
        confusions=list(_confusions(found)),
        fields=_fields(found),
        failures=found.failures,
        changes=list(_all_changes(found)),
    )


def _chart(found: Evaluation, metric: Metric) -> Chart:
    measured = found.measured[metric.name]
    place = _axis(metric, [value for each in measured.values() for value in _ends(each)])
    lines = []
    for variant in found.variants:
        if each := measured.get(variant.name):
            cells = [*shown_value(each), *shown_comparison(each)]
            verdict = each.comparison.verdict if each.comparison else ""
            lines.append(Line(variant.name, cells, verdict, *map(place, _ends(each))))
    return Chart(metric, lines)


def _ends(measured: Measured) -> tuple[float, float, float]:
    interval = measured.interval
    return interval.low, interval.value, interval.high


def _axis(metric: Metric, values: Sequence[float]) -> Callable[[float], float]:
    """A value's place, in per cent of the axis that all `values` fit on."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = (0.0, 1.0) if metric.is_share else (min(finite), max(finite))
    scale: Callable[[float], float] = math.log if 0 < low * LOG_FROM < high and not metric.is_share else float
    start, width = scale(low), (scale(high) - scale(low)) or 1.0

    def place(value: float) -> float:
        return round(min(100.0, max(0.0, 100 * (scale(value) - start) / width)), 2) if math.isfinite(value) else 0.0

    return place


def _confusions(found: Evaluation) -> Iterator[dict[str, object]]:
    for name, confusion in found.confusions.items():
        labels = [*confusion.labels]
        said = [*labels, *([NO_LABEL] if any(each == NO_LABEL for _, each in confusion.counts) else [])]
        is_matrix = len(labels) <= MAX_LABELS
        yield {
            "name": name,
            "macro_f1": f"{100 * confusion.macro_f1:.1f} %",
            "said": said,
            "matrix": [(label, [confusion.counts.get((label, each), 0) for each in said]) for label in labels]
            if is_matrix
            else [],
            "mistakes": [] if is_matrix else confusion.mistakes(MAX_MISTAKES),
        }


def _fields(found: Evaluation) -> list[tuple[str, list[str]]]:
    """A line for each field of the references, with its share in every variant; the worst first."""
    names = {name for shares in found.fields.values() for name in shares}
    mean = {name: sum(shares.get(name, 0.0) for shares in found.fields.values()) for name in names}
    return [
        (name or "(the value)", [f"{100 * shares.get(name, 0.0):.1f} %" for shares in found.fields.values()])
        for name in sorted(names, key=lambda name: (mean[name], name))[:MAX_FIELDS]
    ]


def _all_changes(found: Evaluation) -> Iterator[Changes]:
    for variant in found.variants:
        if variant.reference and (by := _deciding(found, variant)):
            yield _changes(found, variant, by)


def _deciding(found: Evaluation, variant: Variant) -> Measured | None:
    """The metric that rows are sorted by: the first that looks at replies, else the first that is compared."""
    compared = [
        each[variant.name] for each in found.measured.values() if variant.name in each and each[variant.name].comparison
    ]
    return next((each for each in compared if each.metric.looks_at in ("reply", "judge")), next(iter(compared), None))


def _changes(found: Evaluation, variant: Variant, by: Measured) -> Changes:
    compared = by.comparison
    assert compared
    places: dict[str, list[int]] = {kind: [] for kind in _ORDER}
    for place in range(len(found.rows)):
        if kind := _kind(found, variant, compared, place):
            places[kind].append(place)
    rows = [_row(found, variant, kind, place) for kind in _ORDER for place in places[kind][:MAX_ROWS]]
    totals = [(kind, len(places[kind])) for kind in _ORDER if places[kind]]
    return Changes(variant.name, variant.reference, by.metric.name, counts(compared), totals, rows)


def _kind(found: Evaluation, variant: Variant, compared: Comparison, place: int) -> str:
    """Of a row; empty where nothing changed."""
    if compared.by_row[place] in (BETTER, WORSE):
        return compared.by_row[place]
    own, other = (found.answers[name][place].reply for name in (variant.name, variant.reference))
    return REWORDED if compared.by_row[place] == SAME and own != other else ""


def _row(found: Evaluation, variant: Variant, kind: str, place: int) -> ChangedRow:
    row, names = found.rows[place], (variant.reference, variant.name)
    before, after = (found.answers[name][place].reply for name in names)
    # Where only likelihoods were asked for, there are no replies.
    spans = ([], []) if before is None or after is None else marked(before, after)
    first, second = (Side(name, each, _values(found, name, place)) for name, each in zip(names, spans, strict=True))
    return ChangedRow(row.line, kind, row.question, row.reference, (first, second))


def _values(found: Evaluation, name: str, place: int) -> list[str]:
    """ "f1 80.0 %", of every metric that the row has a value of."""
    return [
        f"{metric.name} {metric.shown(value)}".replace(" ", "\N{NO-BREAK SPACE}")
        for metric in found.metrics
        if name in found.measured[metric.name]
        and (value := found.measured[metric.name][name].by_row[place]) is not None
    ]


def marked(before: str, after: str) -> tuple[list[Span], list[Span]]:
    """Both texts in pieces, those that the other does not have marked."""
    words = _WORDS.findall(before), _WORDS.findall(after)
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    if max(map(len, words)) > MAX_WORDS or _alike(matcher, *words) < LEAST_ALIKE:
        return [Span(before, False)], [Span(after, False)]
    spans: tuple[list[Span], list[Span]] = ([], [])
    for tag, start, end, begin, stop in matcher.get_opcodes():
        for side, piece in zip(spans, (words[0][start:end], words[1][begin:stop]), strict=True):
            if piece:
                side.append(Span("".join(piece), tag != "equal"))
    return spans


def _alike(matcher: difflib.SequenceMatcher[str], one: Sequence[str], other: Sequence[str]) -> float:
    """The share of words, without the spaces between, that both have in the same order."""
    shared = [word for block in matcher.get_matching_blocks() for word in one[block.a : block.a + block.size]]
    counts = [sum(not word.isspace() for word in words) for words in (shared, one, other)]
    return 2 * counts[0] / (counts[1] + counts[2] or 1)
