"""The table of metrics: what each makes of an answer, and how rows come to one number.

To add a metric, write its function in a file of its own and add its row to `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgelora.errors import DataFileError, SettingsError
from edgelora.evaluation.answers import Answer
from edgelora.evaluation.bootstrap import Floats, RowSums
from edgelora.evaluation.json_fields import NotJSONError, field_counts, is_json, parse_json
from edgelora.evaluation.labels import Labels
from edgelora.evaluation.own_function import OwnFunction
from edgelora.evaluation.pattern import Pattern
from edgelora.evaluation.rows import EvalRow
from edgelora.evaluation.text_overlap import contains, exact_match, rouge_l, token_f1
from edgelora.rows import listed_problems

MAX_LABEL_WORDS, ROWS_PER_LABEL = 4, 3
"""Rows are of a classification where no reference has more words, and each has so many rows on average."""
SAME_LOSS = 0.01
"""Nats a token by which a reference has to become likelier or less likely for its row to count as changed."""

Sums = tuple[float, float] | None
"""What a row adds above and below the line of a ratio of sums (`bootstrap.RowSums`); None for no value."""


@dataclass(frozen=True)
class Metric:
    """A metric, ready for the rows of a run.

    Attributes:
        of: a row's sums.
        looks_at: "reply", "likelihood", "divergence" or "judge".
        is_share: from 0 to 1, and shown as per cent.
        is_lower_better: of perplexity and divergence.
        same: by how much the rows of two variants may differ, each its ratio of sums, and still count as the same.
        transform: of the ratio of all sums.
        beside: what a row has where two variants are equally good, of a metric that compares each with its reference
            by itself; None where the reference has a value of its own to compare with.
    """

    name: str
    of: Callable[[Answer, EvalRow], Sums] = field(repr=False, compare=False)
    looks_at: str = "reply"
    is_share: bool = True
    is_lower_better: bool = False
    same: float = 0.0
    transform: Callable[[Floats], Floats] = np.asarray
    beside: float | None = None

    def sums(self, answers: Sequence[Answer], rows: Sequence[EvalRow]) -> RowSums:
        """Of all rows."""
        found = [self.of(answer, row) or (np.nan, np.nan) for answer, row in zip(answers, rows, strict=True)]
        above, below = np.array(found, np.float64).T
        return RowSums(above, below, self.transform)

    def shown(self, value: float, *, signed: bool = False) -> str:
        """As tables show it; `signed` for a difference, of shares in percentage points."""
        if not np.isfinite(value):
            return "-"
        sign = "+" if signed else ""
        if self.is_share:
            return f"{100 * value:{sign}.1f} {'pt' if signed else '%'}"
        return f"{value:{sign}.4g}" if abs(value) < 1000 else f"{value:{sign},.0f}"


@dataclass(frozen=True)
class MetricKind:
    """A row of the table.

    Attributes:
        make: the metric for some rows; the text is what stands after `=` in `--metric regex=PATTERN`.
        takes_text: whether there is one.
    """

    name: str
    summary: str
    make: Callable[[str, Sequence[EvalRow]], Metric]
    takes_text: bool = False


def on_reply(name: str, score: Callable[[str, str], float]) -> Callable[[str, Sequence[EvalRow]], Metric]:
    """A metric that compares each reply with its reference."""

    def make(_text: str, _rows: Sequence[EvalRow]) -> Metric:
        return Metric(name, lambda answer, row: (score(answer.reply or "", row.reference), 1.0))

    return make


PERPLEXITY = Metric(
    "perplexity",
    lambda answer, _: None if answer.loss is None else (answer.loss, float(answer.n_tokens)),
    "likelihood",
    is_share=False,
    is_lower_better=True,
    same=SAME_LOSS,
    transform=np.exp,
)


def _accuracy(_text: str, rows: Sequence[EvalRow]) -> Metric:
    labels = Labels([row.reference for row in rows])
    return Metric(
        "accuracy", lambda answer, row: (float(labels.of(answer.reply or "") == labels.of(row.reference)), 1.0)
    )


def _json_fields(_text: str, rows: Sequence[EvalRow]) -> Metric:
    _check_references(rows, parse_json, "is no JSON, which json-fields compares with", NotJSONError)

    def of(answer: Answer, row: EvalRow) -> Sums:
        right, count, _ = field_counts(answer.reply or "", row.reference)
        return float(right), float(count)

    return Metric("json-fields", of)


def _regex(text: str, rows: Sequence[EvalRow]) -> Metric:
    pattern = Pattern(text)

    def find(reference: str) -> None:
        if pattern.extracted(reference) is None:
            raise ValueError

    if pattern.compares:
        _check_references(rows, find, f"does not have {text!r}, which regex compares with", ValueError)
    return Metric("regex", lambda answer, row: (pattern.score(answer.reply or "", row.reference), 1.0))


def _check_references(rows: Sequence[EvalRow], read: Callable[[str], Any], problem: str, kind: type[Exception]) -> None:
    problems = []
    for row in rows:
        try:
            read(row.reference)
        except kind:
            problems.append(f"line {row.line}: the reference {problem}")
    if problems:
        raise DataFileError(listed_problems(problems, "rows"), hint="Choose metrics with --metric.")


METRICS: Mapping[str, MetricKind] = {
    kind.name: kind
    for kind in (
        MetricKind("perplexity", "of the references, under the chat template (lower is better)", lambda *_: PERPLEXITY),
        MetricKind(
            "exact-match",
            "the reply is the reference, but for white space around",
            on_reply("exact-match", exact_match),
        ),
        MetricKind("contains", "the reply has the reference in it", on_reply("contains", contains)),
        MetricKind(
            "regex",
            "PATTERN is found in the reply; with a group, its last match says the same as in the reference",
            _regex,
            takes_text=True,
        ),
        MetricKind("f1", "words that both have, as SQuAD counts them", on_reply("f1", token_f1)),
        MetricKind("rouge-l", "longest common subsequence of words", on_reply("rouge-l", rouge_l)),
        MetricKind("json", "the reply is JSON", on_reply("json", lambda reply, _: is_json(reply))),
        MetricKind("json-fields", "fields that are the reference's", _json_fields),
        MetricKind("accuracy", "the reply says the label; with a confusion table", _accuracy),
    )
}

DIVERGENCES = (
    Metric(
        "kl",
        lambda answer, _: (answer.divergence.kl, float(answer.divergence.n_tokens)) if answer.divergence else None,
        "divergence",
        is_share=False,
        is_lower_better=True,
    ),
    Metric(
        "top-1",
        lambda answer, _: (
            (float(answer.divergence.same_best), float(answer.divergence.n_tokens)) if answer.divergence else None
        ),
        "divergence",
    ),
)
"""Of what runs on another quantization: how far its distributions are from the first one's."""


def judged(name: str, *, tied: float | None = None) -> Metric:
    """What a judge says.

    Args:
        tied: of one that compares replies, what it makes of equals.
    """

    def of(answer: Answer, _row: EvalRow) -> Sums:
        return None if answer.verdict is None else (answer.verdict, 1.0)

    return Metric(name, of, "judge", is_share=tied is not None, beside=tied)


def own(function: OwnFunction, path: str) -> Metric:
    """The user's own function; `path` is the data file."""

    def of(answer: Answer, row: EvalRow) -> Sums:
        return function.score(answer.reply or "", row.reference, row.data, f"{path}:{row.line}"), 1.0

    return Metric(function.name, of, is_share=False)


def make_metrics(specs: Sequence[str], rows: Sequence[EvalRow]) -> list[Metric]:
    """Metrics by name, or as the rows suggest where none is named.

    Raises:
        SettingsError: unknown names, one given twice, or a text missing or too many; all of them.
        DataFileError: references that a metric cannot compare with, by line.
    """
    chosen = [_parsed(spec) for spec in specs or suggested(rows)]
    names = [name for name, _, _ in chosen]
    problems = [problem for _, _, problem in chosen if problem]
    problems += [f"metric {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise SettingsError("; ".join(problems), hint=f"There are: {', '.join(METRICS)}.")
    return [METRICS[name].make(text, rows) for name, text, _ in chosen]


def _parsed(spec: str) -> tuple[str, str, str]:
    """Name, text and problem of one `--metric`."""
    name, equals, text = spec.partition("=")
    name = name.strip().replace("_", "-").lower()
    if name not in METRICS:
        return name, text, f"unknown metric {name!r}"
    if METRICS[name].takes_text and not text:
        return name, text, f"metric {name} needs a text: {name}=PATTERN"
    if equals and not METRICS[name].takes_text:
        return name, text, f"metric {name} takes no text"
    return name, text, ""


def suggested(rows: Sequence[EvalRow]) -> list[str]:
    """Names of the metrics that suit these references."""
    references = [row.reference for row in rows]
    if all(_is_object(reference) for reference in references):
        return ["perplexity", "exact-match", "json", "json-fields"]
    labels = {reference.strip() for reference in references}
    is_short = max(len(label.split()) for label in labels) <= MAX_LABEL_WORDS
    if is_short and 1 < len(labels) <= len(references) / ROWS_PER_LABEL:
        return ["perplexity", "accuracy"]
    return ["perplexity", "exact-match", "f1", "rouge-l"]


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict | list)
    except NotJSONError:
        return False
