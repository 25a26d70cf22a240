"""What was said: every conversation of `edgelora chat`, in one SQLite file in the store.

    conversations   id, started (ISO 8601, UTC), base, title (the first question)
    messages        conversation, place, role, content, adapter, written (ISO 8601, UTC)

A question and its answer are written together when the answer is complete, so a crash loses at most the answer on the
screen. The file is readable by its owner alone.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edgelora.errors import DataFileError, SettingsError
from edgelora.messages import Message

NAME = "history.sqlite3"
VERSION = 1
BUSY_SECONDS = 5.0  # another chat is writing
TITLE_LENGTH = 80
_TABLES = """
CREATE TABLE conversations (id INTEGER PRIMARY KEY, started TEXT NOT NULL, base TEXT NOT NULL, title TEXT NOT NULL);
CREATE TABLE messages (
    conversation INTEGER NOT NULL REFERENCES conversations, place INTEGER NOT NULL, role TEXT NOT NULL,
    content TEXT NOT NULL, adapter TEXT NOT NULL, written TEXT NOT NULL, PRIMARY KEY (conversation, place));
CREATE INDEX by_adapter ON messages (adapter);
"""


@dataclass(frozen=True)
class Conversation:
    """One conversation in a list.

    Attributes:
        started: ISO 8601, UTC.
        adapters: all that answered in it, "none" for the bare base.
        title: the beginning of its first question.
        messages: how many.
    """

    id: int
    started: str
    base: str
    adapters: tuple[str, ...]
    title: str
    messages: int


class History:
    """The file in a store's folder; it is made when the first answer is written.

    Raises, from every method:
        DataFileError: the file cannot be read or written, or is none of ours.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def begin(self, base: str, question: str) -> int:
        """A new conversation's number."""
        title = _storable(" ".join(question.split())[:TITLE_LENGTH])
        with self._open(make=True) as database:
            values = (_now(), base, title)
            cursor = database.execute("INSERT INTO conversations (started, base, title) VALUES (?, ?, ?)", values)
            return int(cursor.lastrowid or 0)

    def add(self, conversation: int, messages: Sequence[Message], adapter: str) -> None:
        """Messages that were said, in their order."""
        with self._open(make=True) as database:
            (count,) = database.execute(
                "SELECT count(*) FROM messages WHERE conversation = ?", (conversation,)
            ).fetchone()
            database.executemany(
                "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (conversation, count + at, each["role"], _storable(each["content"]), adapter, _now())
                    for at, each in enumerate(messages)
                ],
            )

    def find(self, words: str = "", *, limit: int = 50) -> list[Conversation]:
        """The latest conversations in which every one of these words was said, by either side; upper and lower case are
        one (in ASCII letters)."""
        conditions = ["EXISTS (SELECT 1 FROM messages m WHERE m.conversation = c.id AND m.content LIKE ? ESCAPE '\\')"]
        wanted = [f"%{_literal(word)}%" for word in words.split()]
        where = " AND ".join(conditions * len(wanted)) or "1"
        query = (
            "SELECT c.id, c.started, c.base, c.title, "
            "(SELECT group_concat(DISTINCT adapter) FROM messages WHERE conversation = c.id), "
            "(SELECT count(*) FROM messages WHERE conversation = c.id) "
            f"FROM conversations c WHERE {where} ORDER BY c.id DESC LIMIT ?"
        )
        if not self.path.exists():
            return []
        with self._open() as database:
            rows = database.execute(query, [*wanted, limit]).fetchall()
        return [
            Conversation(id, started, base, tuple((adapters or "").split(",")), title, count)
            for id, started, base, title, adapters, count in rows
        ]

    def read(self, conversation: int) -> list[tuple[str, str, str]]:
        """(role, content, adapter) of its messages.

        Raises:
            SettingsError: there is no such conversation.
        """
        rows: list[tuple[str, str, str]] = []
        if self.path.exists():
            with self._open() as database:
                query = "SELECT role, content, adapter FROM messages WHERE conversation = ? ORDER BY place"
                rows = database.execute(query, (conversation,)).fetchall()
        if not rows:
            raise SettingsError(f"no conversation {conversation}", hint="edgelora chat --history lists them.")
        return rows

    @contextmanager
    def _open(self, *, make: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            if make:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as database, database:
                database.execute("BEGIN IMMEDIATE" if make else "BEGIN")
                self._check(database, make)
                yield database
        except (sqlite3.Error, OSError) as error:
            raise DataFileError(
                f"{self.path}: the history cannot be used ({error})", hint="Move it away, or chat with --no-log."
            ) from None

    def _check(self, database: sqlite3.Connection, make: bool) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0 and make:
            for statement in _TABLES.strip().split(";\n"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {VERSION}")
        elif version > VERSION:
            raise sqlite3.DatabaseError(f"it was made by a newer edgelora: version {version}, this one knows {VERSION}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _literal(word: str) -> str:
    """A word for LIKE, its wildcards as themselves."""
    return "".join(f"\\{character}" if character in "\\%_" else character for character in word)


def _storable(text: str) -> str:
    """Lone surrogates, which a terminal can give and UTF-8 cannot hold, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
