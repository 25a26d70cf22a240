"""Rows to conversations: a file's in one format, those of several files in the shares that their weights give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from edgelora.dataset.formats import HINT, Format, conversation_of, format_of
from edgelora.dataset.source import DataSource, nothing_left, weighted
from edgelora.errors import DataFileError
from edgelora.messages import Conversation
from edgelora.rows import Row, listed_problems

Given = Path | str | DataSource | Sequence[DataSource]
"""Training data: a file; a text as on the command line, `PATH[@WEIGHT]`; or sources."""
Item = TypeVar("Item")


class RowReader:
    """Reads the rows of one file, all in the format of the first."""

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self.format: Format | None = None
        self._first = 0

    def read(self, row: Row) -> Conversation | str:
        """The conversation in a row, or what is wrong with the row."""
        found = None if row.problem else format_of(row.data)
        if found is not None and self.format is None:
            self.format, self._first = found, row.line
        if found is not None and found is not self.format and self.format is not None:
            return (
                f"a row of the format {found.name} ({found.shape}), where row {self._first} has the format "
                f"{self.format.name} ({self.format.shape}); a file has one"
            )
        return conversation_of(row, self.source.place(row))


def read_conversations(data: Given, seed: int = 0) -> list[Conversation]:
    """Every training conversation of a file, or of several, each as often as its weight says.

    Args:
        seed: chooses the rows of a file whose weight is no whole number.

    Raises:
        DataFileError: a file cannot be read, holds no row, or holds bad rows (up to eight of all are named by line).
        MissingExtraError: a dataset of the hub or a Parquet file, without the packages that read them.
    """
    return read_all(data, seed, lambda source: RowReader(source).read, HINT)


def read_all(
    data: Given, seed: int, reader_of: Callable[[DataSource], Callable[[Row], Item | str]], hint: str
) -> list[Item]:
    """What the readers of all sources make of their rows.

    Args:
        reader_of: makes the reader of one source; that returns what is in a row, or what is wrong with it.
    """
    items, problems = list[Item](), list[str]()
    for number, source in enumerate(sources_of(data)):
        read, found, n_problems = reader_of(source), list[Item](), len(problems)
        for row in source.rows():
            item = read(row)
            if isinstance(item, str):
                problems.append(f"{source.place(row)}: {item}")
            else:
                found.append(item)
        if not found and len(problems) == n_problems:
            problems.append(f"{source.name}: no rows")
        if nothing := nothing_left(source.name, len(found), source.weight):
            problems.append(nothing)
        items += weighted(found, source.weight, f"{seed}/{number}")
    if problems:
        raise DataFileError(listed_problems(problems), hint=hint)
    return items


def sources_of(data: Given) -> Sequence[DataSource]:
    """What is given, as sources.

    Raises:
        SettingsError: a text with a weight that is no number above 0.
    """
    if isinstance(data, Path):
        return (DataSource(str(data)),)
    if isinstance(data, str):
        return (DataSource.parse(data),)
    return (data,) if isinstance(data, DataSource) else data
