"""One pass over the rows of training or evaluation data: counts and hashes are kept, no row is."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from edgelora.dataset.formats import Format
from edgelora.dataset.reading import RowReader
from edgelora.dataset.repeats import RowHashes
from edgelora.dataset.source import DataSource
from edgelora.dataset.turns import oddities
from edgelora.messages import Conversation
from edgelora.preferences import Preference, preference_of
from edgelora.rows import MAX_PROBLEMS_SHOWN, Row

ROWS_AT_ONCE = 64
MAX_KINDS = 100
"""So many different problems of rows are told apart."""
OTHERS = "other problems"
PAIR = "preference pair"


@dataclass(frozen=True)
class Measured:
    """A conversation in tokens.

    Attributes:
        lengths: tokens of each sequence that it becomes, before that is cut.
        n_trained: tokens that are trained of what is kept.
        oddities: what is noticed, in words that go on with "rows ...".
    """

    lengths: tuple[int, ...] = ()
    n_trained: int = 0
    oddities: tuple[str, ...] = ()


class Measure(Protocol):
    """Counts tokens as a base's tokenizer and template make them (`edgelora.train.token_check`)."""

    def __call__(self, conversations: Sequence[Conversation]) -> list[Measured | str]:
        """Of each what it is in tokens, or why a run would refuse it."""


@dataclass
class FileCount:
    """A file, and how many rows it has: good ones and bad ones."""

    source: DataSource
    format: Format | None = None
    rows: int = 0
    bad_rows: int = 0


@dataclass
class Noticed:
    """How many rows something is true of, and which are the first."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.places) < MAX_PROBLEMS_SHOWN:
            self.places.append(place)


class Scan:
    """The rows of one side, training or evaluation; about 40 bytes are kept of each.

    Args:
        n_files: how many there will be.
        measure: counts tokens; None leaves them uncounted.
        progress: called with the number of rows that were read.
    """

    def __init__(self, n_files: int, measure: Measure | None, progress: Callable[[int], None]) -> None:
        self.files: list[FileCount] = []
        self.problems: dict[str, Noticed] = {}
        self.odd: dict[str, Noticed] = {}
        self.ignored: Counter[str] = Counter()
        self.roles: Counter[str] = Counter()
        self.with_tools = 0
        self.turns, self.tokens = array("I"), array("I")
        self.n_trained = 0
        self.hashes = RowHashes()
        self._files_of_rows, self._lines = array("I"), array("I")
        self._n_files, self._measure, self._progress = n_files, measure, progress

    @property
    def n_rows(self) -> int:
        return len(self._lines)

    def place(self, index: int) -> str:
        """Of a good row, as `place_in` says it."""
        return self.place_in(self.files[self._files_of_rows[index]], self._lines[index])

    def place_in(self, file: FileCount, line: int) -> str:
        """`line 7`, or `FILE:7` where there are several files."""
        return f"line {line}" if self._n_files == 1 else f"{file.source.short_name}:{line}"

    def add(self, source: DataSource) -> None:
        """Read a file to its end.

        Raises:
            DataFileError, MissingExtraError: it cannot be read.
        """
        file, reader = FileCount(source), RowReader(source)
        self.files.append(file)
        rows = source.rows()
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            self._add_rows(batch, reader, file)
            self._progress(file.rows + file.bad_rows)
        file.format = reader.format

    def _add_rows(self, rows: Sequence[Row], reader: RowReader, file: FileCount) -> None:
        examples = [read_example(reader, row) for row in rows]
        measured = self._measured(examples)
        for row, example in zip(rows, examples, strict=True):
            told = example if isinstance(example, str) else [next(measured) for _ in example]
            problem = told if isinstance(told, str) else next((one for one in told if isinstance(one, str)), "")
            if problem or isinstance(example, str):
                file.bad_rows += 1
                known = problem in self.problems or len(self.problems) < MAX_KINDS
                self.problems.setdefault(problem if known else OTHERS, Noticed()).add(self.place_in(file, row.line))
                continue
            file.rows += 1
            self._files_of_rows.append(len(self.files) - 1)
            self._lines.append(row.line)
            if reader.format:
                self.ignored.update(reader.format.ignored(row.data))
            self._count(example, [one for one in told if isinstance(one, Measured)])

    def _measured(self, examples: Sequence[Sequence[Conversation] | str]) -> Iterator[Measured | str]:
        flat = [conversation for example in examples if not isinstance(example, str) for conversation in example]
        return iter(self._measure(flat) if self._measure else [Measured()] * len(flat))

    def _count(self, conversations: Sequence[Conversation], measured: Sequence[Measured]) -> None:
        self.hashes.add(conversations)
        first = conversations[0]
        self.with_tools += bool(first.tools)
        self.turns.append(len(first.messages))
        self.roles.update(message["role"] for message in first.messages)
        self.tokens.extend(length for one in measured for length in one.lengths)
        self.n_trained += sum(one.n_trained for one in measured)
        found = [odd for each in conversations if not each.plain for odd in oddities(each.messages)]
        for odd in dict.fromkeys([*found, *(odd for one in measured for odd in one.oddities)]):
            self.odd.setdefault(odd, Noticed()).add(self.place(self.n_rows - 1))


def read_example(reader: RowReader, row: Row) -> tuple[Conversation, ...] | str:
    """What is trained of a row: its conversation, or of a preference pair both; or what is wrong with it."""
    found = reader.read(row)
    if reader.format is None or reader.format.name != PAIR or row.problem:
        return found if isinstance(found, str) else (found,)
    pair = preference_of(row, reader.source.place(row))
    return pair if isinstance(pair, str) else _sides(pair)


def _sides(pair: Preference) -> tuple[Conversation, Conversation]:
    chosen, rejected = (Conversation((*pair.prompt, *reply), pair.source) for reply in (pair.chosen, pair.rejected))
    return chosen, rejected
