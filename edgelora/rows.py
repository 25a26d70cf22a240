"""Files of rows: JSONL, a JSON array, CSV, Parquet or plain text, by their suffix; a row at a time, as it is asked for.

    train.jsonl        {"prompt": "Is it waterproof?", "completion": "Yes, IP67."}      one object a line
    train.json         [{"prompt": "Is it waterproof?", "completion": "Yes, IP67."}, ...]
    train.csv          prompt,completion                                                a header, then the rows
    train.parquet      columns of these names
    book.txt           one row for the file: {"text": "It was a dark and stormy night ..."}

What a row means is up to who reads it: `edgelora.dataset` for training, `edgelora.batch_rows` for a batch.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgelora.errors import DataFileError
from edgelora.json_type import json_type

MAX_PROBLEMS_SHOWN = 8
MAX_CSV_FIELD = 2**31 - 1  # Python's own limit is 128 KiB
JSON_PIECE = 1 << 20
"""Bytes of a JSON array that are read at once."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One row of a data file: its 1-based line (its number in a JSON array or in Parquet), its fields, or what is
    wrong with it.

    `data` is empty exactly where `problem` is not. `columns` are those of the file, where it has any: an empty cell is
    in no row's `data`.
    """

    line: int
    data: Mapping[str, Any]
    problem: str = ""
    columns: tuple[str, ...] = ()


def read_rows(path: Path | str) -> Iterator[Row]:
    """Rows of a file, read as its suffix says, or of JSONL on standard input for `-`; blank lines are skipped.

    A row that cannot be read is yielded with its `problem`, so that the caller decides whether one bad row ends the
    work (training) or is only reported (batch).

    Raises:
        DataFileError: the file is missing, not a file, or not what its suffix says.
        MissingExtraError: a Parquet file, without pyarrow.
    """
    with _open_text(path) as file:
        yield from _READERS.get(Path(path).suffix.lower(), _jsonl_rows)(file)


@contextmanager
def _open_text(path: Path | str) -> Iterator[IO[bytes]]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; a separate try keeps errors of the body out of this one
    except OSError as error:
        raise DataFileError(
            f"{path}: {error.strerror}", hint=f"Give a file of rows: {', '.join(SUFFIXES)}; JSONL has an object a line."
        ) from None
    with file:
        yield file


def _jsonl_rows(file: IO[bytes]) -> Iterator[Row]:
    for line, raw in enumerate(file, start=1):
        text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
        if not text.strip():
            continue
        try:
            data = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError:
            yield Row(line, {}, "not UTF-8 text")
        except json.JSONDecodeError as error:
            yield Row(line, {}, f"not JSON ({error.msg} at column {error.colno})")
        except ValueError:  # Python reads no numbers of more than 4,300 digits
            yield Row(line, {}, "not JSON (a number with too many digits)")
        except RecursionError:
            yield Row(line, {}, "JSON nested too deeply")
        else:
            yield (
                Row(line, data)
                if isinstance(data, dict)
                else Row(line, {}, f"a JSON {json_type(data)}, expected an object")
            )


def _json_rows(file: IO[bytes]) -> Iterator[Row]:
    """Items of an array; a file that begins with an object is JSONL under another name."""
    if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        file.seek(0)
        yield from _jsonl_rows(file)
        return
    file.seek(0)
    items, number = _JsonItems(file), 0
    while True:
        number += 1
        try:
            data = items.next()
        except StopIteration:
            return
        except UnicodeDecodeError:
            yield Row(number, {}, "not UTF-8 text")
            return
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"not JSON ({error})")
            return  # where the next item begins cannot be told
        if isinstance(data, dict):
            yield Row(number, data)
        else:
            yield Row(number, {}, f"a JSON {json_type(data)}, expected an object")


class _JsonItems:
    """The items of a JSON array, with no more of the file in memory than the piece that the next one ends in."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._line, self._begun = "", 0, 1, False

    def next(self) -> Any:
        """Raises StopIteration at the end, ValueError where it is no JSON array."""
        wanted, mark = ("," if self._begun else "["), self._mark()
        if self._begun and mark == "]":
            self._pass(self._at + 1)
            if self._mark():
                raise ValueError(f"something after the end of the array, at line {self._line}")
            raise StopIteration
        if mark != wanted:
            raise ValueError(f"expected {wanted!r} at line {self._line}" if mark else "it ends in the middle")
        self._pass(self._at + 1)
        if not self._begun and self._mark() == "]":
            self._begun = True
            return self.next()
        self._begun = True
        self._mark()
        return self._value()

    def _mark(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            blank = _BLANKS.match(self._text, self._at)
            self._pass(blank.end() if blank else self._at)
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def _value(self) -> Any:
        while True:
            try:
                value, end = _JSON.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 8
                if not (unfinished and self._grow()):
                    line = self._line + self._text.count("\n", self._at, error.pos)
                    raise ValueError(f"{error.msg.removesuffix(' at')} at line {line}") from None
            else:
                if end < len(self._text) or not self._grow():  # a number may go on in the next piece
                    self._pass(end)
                    return value

    def _pass(self, position: int) -> None:
        self._line += self._text.count("\n", self._at, position)
        self._at = position

    def _grow(self) -> bool:
        """Read on: as much again as is waiting, so that a long item is not decoded too often."""
        rest = self._text[self._at :]
        piece = self._file.read(max(JSON_PIECE, len(rest)))
        self._text, self._at = rest + self._decoder.decode(piece, final=not piece), 0
        return bool(piece)


_JSON, _BLANKS = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")


def _text_row(file: IO[bytes]) -> Iterator[Row]:
    """The file as one row, without the newlines at its end."""
    try:
        text = file.read().decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        yield Row(1, {}, f"not UTF-8 text (byte {error.start})")
        return
    if text.strip():
        yield Row(1, {"text": text})


def _csv_rows(file: IO[bytes]) -> Iterator[Row]:
    csv.field_size_limit(MAX_CSV_FIELD)
    # Bytes that are not UTF-8 pass as surrogates, so that they spoil their own row and no other.
    lines = (raw.decode("utf-8-sig" if i == 0 else "utf-8", "surrogateescape") for i, raw in enumerate(file))
    reader = csv.DictReader(lines, strict=True)
    try:
        names = Counter(filter(None, reader.fieldnames or ()))
    except csv.Error as error:
        yield Row(reader.line_num, {}, f"not CSV ({error})")
        return
    if twice := [f"`{name}`" for name, count in names.items() if count > 1]:
        yield Row(1, {}, f"the header has {', '.join(twice)} more than once: which column is meant cannot be told")
        return
    while True:
        try:
            data = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(reader.line_num, {}, f"not CSV ({error})")
            return  # the reader's quoting state is lost: what follows cannot be told apart
        if None in data or None in data.values():
            yield Row(
                reader.line_num, {}, f"a row of another length than the header ({', '.join(reader.fieldnames or ())})"
            )
        elif any(_SURROGATE.search(text) for text in (*data, *data.values())):
            yield Row(reader.line_num, {}, "not UTF-8 text")
        else:
            filled = {name: value for name, value in data.items() if value != ""}
            yield Row(reader.line_num, filled, columns=tuple(data))


def _parquet_rows(file: IO[bytes]) -> Iterator[Row]:
    from edgelora.parquet import parquet_rows

    for number, (columns, data) in enumerate(parquet_rows(file), start=1):
        yield Row(number, data, columns=columns)


_READERS: dict[str, Callable[[IO[bytes]], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".txt": _text_row,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
SUFFIXES = tuple(_READERS)


def listed_problems(problems: Sequence[str], what: str = "bad rows", count: int | None = None) -> str:
    """The first problems, a line each, and how many more there are.

    Args:
        count: of all problems, where `problems` are the first of them only.
    """
    shown = list(problems[:MAX_PROBLEMS_SHOWN])
    rest = (len(problems) if count is None else count) - len(shown)
    return "\n".join([*shown, *([f"... and {rest} more {what}"] if rest > 0 else [])])
