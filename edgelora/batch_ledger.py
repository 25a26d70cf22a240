"""What a batch has to do, and what of it is done: a temporary SQLite file, so that memory does not grow with the rows.

    rows       place (0-based, in the input), line, identity, key, first_line (0, or the line that used the id before),
               rank (in a sample), wanted (0 or 1), done (TO_DO, ANSWERED or FAILED), at (0-based, in the output)
    seen       name, n: how often a row without id came
    replaced   at: rows of the output to be dropped at the end

A row's identity is its `id`; where it has none, what it says and how often that was said before it, so that a line
inserted above costs nothing. Identities are kept as digests. SQLite holds `CACHE_KIB` in memory and the rest in the
temporary folder, some 150 bytes a row; the file has no name, so nothing is left of it, whatever ends the process.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Container, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

CACHE_KIB = 4096
TO_DO, ANSWERED, FAILED = 0, 1, 2
_SCHEMA = """
CREATE TABLE rows (place INTEGER PRIMARY KEY, line INTEGER, identity BLOB UNIQUE, key TEXT, first_line INTEGER,
                   rank BLOB, wanted INTEGER DEFAULT 1, done INTEGER DEFAULT 0, at INTEGER);
CREATE TABLE seen (name BLOB PRIMARY KEY, n INTEGER) WITHOUT ROWID;
CREATE TABLE replaced (at INTEGER PRIMARY KEY);
"""


@dataclass(frozen=True)
class Selection:
    """Which rows of the input are answered; the others are as if they were done.

    Attributes:
        limit: the first so many.
        sample: so many of those, drawn by `seed` and what the rows say: the same rows in every run, those of a smaller
            sample among those of a larger one.
    """

    limit: int | None = None
    sample: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Entry:
    """What is known of one row of the input."""

    place: int
    key: str
    first_line: int
    wanted: bool
    done: int
    at: int | None

    @property
    def is_to_do(self) -> bool:
        return self.wanted and self.done == TO_DO


class Ledger:
    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(f"PRAGMA cache_size = -{CACHE_KIB}; PRAGMA journal_mode = OFF; {_SCHEMA} BEGIN;")
        self.replaced: Container[int] = _Replaced(self._db)

    def add(self, place: int, line: int, labels: Mapping[str, Any], key: str) -> None:
        """Note a row of the input: `labels` are its `id`, if it has one."""
        identity, first_line = self._identity(labels, key, "input"), 0
        if labels and (before := self._db.execute("SELECT line FROM rows WHERE identity = ?", [identity]).fetchone()):
            first_line = before[0]
            identity = self._identity({**labels, "line": line}, key, "input")
        sample = self._selection.sample
        rank = _digest(f"{self._selection.seed} {key} {identity.hex()}") if sample is not None else None
        row = (place, line, identity, key, first_line, rank)
        self._db.execute("INSERT INTO rows (place, line, identity, key, first_line, rank) VALUES (?,?,?,?,?,?)", row)

    def select(self) -> None:
        """After the last row was added: leave those to do that the selection has."""
        limit, sample = self._selection.limit, self._selection.sample
        if limit is not None:
            self._db.execute("UPDATE rows SET wanted = 0 WHERE place >= ?", [limit])
        if sample is not None:
            drawn = "SELECT place FROM rows WHERE wanted ORDER BY rank LIMIT ?"
            self._db.execute(f"UPDATE rows SET wanted = 0 WHERE place NOT IN ({drawn})", [sample])

    def entry(self, place: int) -> Entry | None:
        """The row at a place of the input."""
        return self._find("place = ?", place)

    def find(self, labels: Mapping[str, Any], key: str, *, is_error: bool) -> Entry | None:
        """The input's row that a row of the output answers: `labels` are its `id`, its `line`, or both for an id used
        twice. To be called once for each row of the output, in order.

        Errors are counted apart: the error of a row may stand in the output beside its later result.
        """
        return self._find("identity = ?", self._identity(labels, key, "errors" if is_error else "results"))

    def mark(self, entry: Entry, at: int, *, is_error: bool) -> None:
        """Note that the row at this place of the output answers the entry."""
        done = FAILED if is_error else ANSWERED
        self._db.execute("UPDATE rows SET done = ?, at = ? WHERE place = ?", [done, at, entry.place])

    def replace(self, at: int) -> None:
        """Note a row of the output to be dropped at the end."""
        self._db.execute("INSERT OR IGNORE INTO replaced VALUES (?)", [at])

    @property
    def n_replaced(self) -> int:
        return self._number("SELECT COUNT(*) FROM replaced")

    @property
    def n_wanted(self) -> int:
        return self._number("SELECT COUNT(*) FROM rows WHERE wanted")

    @property
    def n_done(self) -> int:
        return self._number("SELECT COUNT(*) FROM rows WHERE wanted AND done")

    @property
    def n_failed(self) -> int:
        """Of those done, how many are errors."""
        return self._number("SELECT COUNT(*) FROM rows WHERE wanted AND done = ?", FAILED)

    def _number(self, query: str, *values: Any) -> int:
        return int(self._db.execute(query, values).fetchone()[0])

    def _find(self, where: str, value: Any) -> Entry | None:
        columns = "place, key, first_line, wanted, done, at"
        row = self._db.execute(f"SELECT {columns} FROM rows WHERE {where}", [value]).fetchone()
        return Entry(row[0], row[1], row[2], bool(row[3]), row[4], row[5]) if row else None

    def _identity(self, labels: Mapping[str, Any], key: str, among: str) -> bytes:
        known = json.dumps(labels["id"], sort_keys=True) if "id" in labels else ""
        if known and "line" not in labels:
            return _digest(f"id {known}")
        said = f"{f'id {known}, ' if known else ''}row {said_of(key)}"
        count = "INSERT INTO seen VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET n = n + 1 RETURNING n"
        number = self._number(count, _digest(f"{among}: {known} {key}"))
        return _digest(f"{said}, number {number}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()


class _Replaced:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __contains__(self, at: object) -> bool:
        return self._db.execute("SELECT 1 FROM replaced WHERE at = ?", [at]).fetchone() is not None


def said_of(key: str) -> str:
    """The part of a key that stands for what the row said; the others stand for what answered it."""
    return key.partition(".")[0]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
