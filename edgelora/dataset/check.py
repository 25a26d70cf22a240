"""What `edgelora data check` finds in training data: what a run would refuse, what is odd, and how much there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgelora.dataset.lengths import Bucket, Spread, histogram, spread
from edgelora.dataset.reading import RowReader
from edgelora.dataset.repeats import Indices, first_of, shared
from edgelora.dataset.scan import Measure, Scan, read_example
from edgelora.dataset.source import DataSource, nothing_left
from edgelora.errors import DataFileError
from edgelora.messages import Conversation
from edgelora.rows import MAX_PROBLEMS_SHOWN

Level = Literal["error", "warning", "note"]
EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """Something that is so of `count` rows, of which `examples` are the first; 0 where it is so of no row."""

    level: Level
    count: int
    text: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileSummary:
    """A file and what is in it.

    Attributes:
        format: of its rows; empty where none has a known one.
        weight: how often its rows are seen.
    """

    name: str
    format: str
    rows: int
    bad_rows: int
    weight: float


@dataclass(frozen=True)
class TemplateShare:
    """What a chat template adds to rows, in tokens, and the special tokens among them."""

    tokens: Spread
    special: tuple[str, ...]


@dataclass(frozen=True)
class ShownRow:
    """A row as the model sees it: its text in pieces, each with whether it is trained.

    Attributes:
        is_cut: the row goes on, and a run would not see the rest.
    """

    source: str
    segments: tuple[tuple[str, bool], ...]
    is_cut: bool = False


@dataclass(frozen=True)
class DataCheck:
    """What was found.

    Attributes:
        turns: of a conversation.
        with_tools: rows that name tools.
        roles: how many messages each role has.
        tokens, histogram: of the training sequences; None and empty where tokens were not counted.
        template, shown: None where no template was used.
    """

    files: tuple[FileSummary, ...]
    eval_files: tuple[FileSummary, ...]
    findings: tuple[Finding, ...]
    turns: Spread | None
    roles: dict[str, int]
    with_tools: int = 0
    tokens: Spread | None = None
    trained_tokens: int = 0
    histogram: tuple[Bucket, ...] = ()
    template: TemplateShare | None = None
    shown: ShownRow | None = None

    def of(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    def passes(self, *, strict: bool = False) -> bool:
        """Whether a run would take the data; strictly, whether nothing is odd about it either."""
        return not self.of("error") and not (strict and self.of("warning"))

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the fields, and findings by their level."""
        from dataclasses import asdict

        fields = asdict(self)
        findings = fields.pop("findings")
        by_level = {
            f"{level}s": [{k: v for k, v in f.items() if k != "level"} for f in findings if f["level"] == level]
            for level in ("error", "warning", "note")
        }
        return {"ok": self.passes(), **fields, **by_level}


def check_data(
    data: Sequence[DataSource],
    eval_data: Sequence[DataSource] = (),
    measure: Measure | None = None,
    progress: Callable[[str, int], None] = lambda name, rows: None,
) -> DataCheck:
    """Read everything once, and say what there is and what is wrong; of rows, hashes alone are kept.

    Args:
        measure: counts tokens, where there is a base.
        progress: called with the name of a file and the number of its rows that were read.

    Raises:
        DataFileError, MissingExtraError: a file that cannot be read at all.
    """
    scan, evaluation = (_scanned(sources, measure, progress) for sources in (data, eval_data))
    found = [*_findings(scan, ""), *_findings(evaluation, "evaluation "), *_overlap(scan, evaluation)]
    return DataCheck(
        _summaries(scan),
        _summaries(evaluation),
        tuple(sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))),
        spread(scan.turns) if scan.turns else None,
        dict(scan.roles),
        scan.with_tools,
        spread(scan.tokens) if scan.tokens else None,
        scan.n_trained,
        tuple(histogram(scan.tokens)) if scan.tokens else (),
    )


def example_at(source: DataSource, line: int | None = None) -> Conversation:
    """The conversation in a row; of a preference pair, the one with the chosen reply.

    Args:
        line: of the row, as messages count; None for the first that can be trained.

    Raises:
        DataFileError: there is none, or it is no row to train on.
    """
    reader = RowReader(source)
    for row in source.rows():
        found = read_example(reader, row)
        if row.line == line and isinstance(found, str):
            raise DataFileError(f"{source.place(row)}: {found}")
        if not isinstance(found, str) and line in (None, row.line):
            return found[0]
    raise DataFileError(f"{source.name}: no row {'to train on' if line is None else f'at line {line}'}")


def _scanned(sources: Sequence[DataSource], measure: Measure | None, progress: Callable[[str, int], None]) -> Scan:
    name = ""
    scan = Scan(len(sources), measure, lambda rows: progress(name, rows))
    for source in sources:
        name = source.name
        scan.add(source)
    return scan


def _summaries(scan: Scan) -> tuple[FileSummary, ...]:
    return tuple(
        FileSummary(f.source.name, f.format.name if f.format else "", f.rows, f.bad_rows, f.source.weight)
        for f in scan.files
    )


def _findings(scan: Scan, side: str) -> Iterator[Finding]:
    """Args:
    side: "evaluation " where it is that.
    """
    for problem, noticed in scan.problems.items():
        yield Finding("error", noticed.count, f"{side}rows refused: {problem}", tuple(noticed.places))
    for file in scan.files:
        if not file.rows and not file.bad_rows:
            yield Finding("error", 0, f"no rows in {file.source.name}")
        if nothing := nothing_left(file.source.name, file.rows, file.source.weight):
            yield Finding("error", 0, nothing)
    for text, noticed in scan.odd.items():
        yield Finding("warning", noticed.count, f"{side}rows {text}", tuple(noticed.places[:EXAMPLES]))
    repeats = scan.hashes.repeats()
    kinds: tuple[tuple[Level, Indices, str, Any], ...] = (
        ("warning", repeats.exact, "that repeat an earlier one", scan.hashes.exact),
        ("warning", repeats.folded, "that repeat an earlier one but for case and spaces", scan.hashes.folded),
        ("note", repeats.asked, "that ask what an earlier one asks, and answer otherwise", scan.hashes.prompts),
    )
    for level, indices, text, hashes in kinds:
        if len(indices):
            pairs = [f"{scan.place(i)} like {scan.place(first_of(hashes, i))}" for i in _first(indices)]
            yield Finding(level, len(indices), f"{side}rows {text}", tuple(pairs))
    for name, count in scan.ignored.most_common(MAX_PROBLEMS_SHOWN):
        yield Finding("note", count, f"{side}rows with a field that the model does not see: {name}")


def _overlap(scan: Scan, evaluation: Scan) -> Iterator[Finding]:
    ours, others = evaluation.hashes, scan.hashes
    same = shared(ours.folded, others.folded)
    asked = np.setdiff1d(shared(ours.prompts, others.prompts), same)
    kinds: tuple[tuple[Level, Indices, str], ...] = (
        ("warning", same, "evaluation rows that are in the training data too, but for case and spaces at most"),
        ("note", asked, "evaluation rows that ask what a training row asks, and answer otherwise"),
    )
    for level, indices, text in kinds:
        if len(indices):
            yield Finding(level, len(indices), text, tuple(evaluation.place(i) for i in _first(indices)))


def _first(indices: Iterable[Any]) -> list[int]:
    return [int(index) for index, _ in zip(indices, range(EXAMPLES), strict=False)]
