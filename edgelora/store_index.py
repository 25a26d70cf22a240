"""The store's index: one small SQLite file of bases and adapters, by path.

    files   path BLOB (as the file system spells it), and the other fields of `entry.Entry`

Any number of processes read and write at once: every change is one immediate transaction, and waits for the others.
What only repeats the files is a cache; what `convert` and `add` told is an address book. An index of an older edgelora
is taken over, a broken one is set aside and begun again, one of a newer edgelora is left alone.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from converters.detect import SourceKind
from edgelora.entry import Entry
from edgelora.errors import ModelFileError

FILE_NAME = "index.sqlite"
VERSION = 2
WAIT_SECONDS = 30.0
_BROKEN = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)

_COLUMNS = tuple(field.name for field in fields(Entry))
_SCHEMA = f"""
CREATE TABLE files (
    path BLOB PRIMARY KEY,
    size_bytes INTEGER NOT NULL,
    {", ".join(f"{name} TEXT NOT NULL" for name in _COLUMNS if name not in ("path", "size_bytes"))}
)
"""
# Version 1 held bases only, and neither their content nor their names: those are read at the next look.
_TAKE_OVER = """
INSERT OR IGNORE INTO files (path, kind, name, detail, fingerprint, base_name, problem, size_bytes, state, content,
                             origin)
SELECT CAST(path AS BLOB), 'GGUF_BASE', '', '', fingerprint, '', '', size_bytes, '', '',
       CASE registered WHEN 1 THEN 'convert' ELSE '' END FROM bases
"""
_SAVE = (
    f"INSERT INTO files ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' for _ in _COLUMNS)}) ON CONFLICT (path) DO "
    f"UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _COLUMNS if name not in ('path', 'origin'))}, "
    "origin = CASE excluded.origin WHEN '' THEN files.origin ELSE excluded.origin END"
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Move:
    """A file that was remembered at `old`, is gone there, and was found again at `new`."""

    old: Path
    new: Path


class Index:
    """The index in `folder`; nothing is created before something is written.

    Attributes:
        notices: what should be told of it: that it was broken and begun again, say.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE_NAME
        self.notices: list[str] = []

    def entries(self) -> dict[Path, Entry]:
        """All of it, by path.

        Raises:
            ModelFileError: it cannot be read. One that is broken counts as empty.
        """
        if not self.path.is_file():
            return {}
        nothing: list[tuple[Any, ...]] = []
        rows = self._guarded(lambda: self._read(f"SELECT {', '.join(_COLUMNS)} FROM files ORDER BY path"), nothing)
        return {entry.path: entry for entry in map(_entry, rows)}

    def remember(self, entries: Iterable[Entry]) -> list[Move]:
        """Add entries, or what is new of them; where one has no origin, that of an earlier one of its path stays.

        A remembered file that is gone, and has the same content as one of these, has moved there.

        Raises:
            ModelFileError: the index cannot be written.
        """
        wanted = list(entries)
        return self._write(lambda connection: [move for entry in wanted for move in _saved(connection, entry)])

    def forget(self, paths: Iterable[Path]) -> None:
        """Raises:
        ModelFileError: the index cannot be written.
        """
        keys = [(os.fsencode(path),) for path in paths]
        self._write(lambda connection: connection.executemany("DELETE FROM files WHERE path = ?", keys))

    def _read(self, query: str) -> list[tuple[Any, ...]]:
        with closing(self._connect("rw")) as connection:
            if _version(connection) == VERSION:
                return connection.execute(query).fetchall()
        self._write(lambda connection: None)  # one of an older edgelora: it is taken over
        return self._read(query)

    def _write(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        with suppress(_Broken):
            return self._guarded(lambda: self._transaction(work))
        self._guarded(self._set_aside)
        return self._guarded(lambda: self._transaction(work))

    def _transaction(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        self.folder.mkdir(parents=True, exist_ok=True)
        with closing(self._connect("rwc")) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                self._upgrade(connection)
                result = work(connection)
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
            return result

    def _connect(self, mode: str) -> sqlite3.Connection:
        source = f"{self.path.absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(source, uri=True, timeout=WAIT_SECONDS, isolation_level=None)

    def _upgrade(self, connection: sqlite3.Connection) -> None:
        version = _version(connection)
        if version > VERSION:
            raise ModelFileError(
                f"{self.path} was written by a newer edgelora (version {version}, this one reads {VERSION})",
                hint="Upgrade edgelora, or name another folder with EDGELORA_HOME.",
            )
        if version == VERSION:
            return
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        connection.execute(_SCHEMA)
        if "bases" in tables:
            connection.execute(_TAKE_OVER)
            connection.execute("DROP TABLE bases")
        connection.execute(f"PRAGMA user_version = {VERSION}")

    def _set_aside(self) -> None:
        """Rename a broken index, once: whoever comes second finds a good one."""
        from filelock import FileLock

        with FileLock(self.path.with_name(FILE_NAME + ".lock")):
            if self._is_sound():
                return
            broken = self.path.with_name(FILE_NAME + ".broken")
            os.replace(self.path, broken)
            for suffix in ("-journal", "-wal", "-shm"):
                self.path.with_name(FILE_NAME + suffix).unlink(missing_ok=True)
        self._tell(
            f"{self.path} was broken and has been begun again (the old one is kept as {broken.name}); what was "
            "registered is forgotten: tell it again with `edgelora add`"
        )

    def _is_sound(self) -> bool:
        try:
            with closing(self._connect("rw")) as connection:
                return bool(connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
        except sqlite3.DatabaseError:
            return False

    def _tell(self, notice: str) -> None:
        if notice not in self.notices:
            self.notices.append(notice)

    def _guarded(self, work: Callable[[], Result], if_broken: Result | None = None) -> Result:
        """`work`, with errors turned into ours; for a broken index `if_broken`, else `_Broken`."""
        try:
            return work()
        except (OSError, sqlite3.Error) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _BROKEN:
                raise self._unusable(error) from None
            if if_broken is None:
                raise _Broken(self._unusable(error).message, hint=self._unusable(error).hint) from None
        self._tell(f"{self.path} is broken: it is begun again with the next file that is looked at")
        return if_broken

    def _unusable(self, error: Exception) -> ModelFileError:
        return ModelFileError(
            f"the store at {self.folder} cannot be used ({error})",
            hint=f"Name another folder with EDGELORA_HOME, or delete {FILE_NAME} in it to start again.",
        )


class _Broken(ModelFileError):
    """SQLite says that the file is no index, or a damaged one."""


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _saved(connection: sqlite3.Connection, entry: Entry) -> list[Move]:
    """Write one entry; what it has replaced elsewhere is deleted, and its origin is kept."""
    moved = _gone_with_content(connection, entry) if entry.content else []
    if moved:
        entry = replace(entry, origin=entry.origin or moved[0].origin)
        connection.executemany("DELETE FROM files WHERE path = ?", [(os.fsencode(old.path),) for old in moved])
    connection.execute(_SAVE, _row(entry))
    return [Move(old.path, entry.path) for old in moved]


def _gone_with_content(connection: sqlite3.Connection, entry: Entry) -> list[Entry]:
    query = f"SELECT {', '.join(_COLUMNS)} FROM files WHERE content = ? AND origin != '' AND path != ?"
    rows = connection.execute(query, (entry.content, os.fsencode(entry.path))).fetchall()
    return [old for old in map(_entry, rows) if not old.is_there]


def _row(entry: Entry) -> tuple[Any, ...]:
    special = {"path": os.fsencode(entry.path), "kind": entry.kind.name if entry.kind else "",
               "size_bytes": entry.size_bytes}  # fmt: skip
    return tuple(special.get(name, _storable(getattr(entry, name))) for name in _COLUMNS)


def _storable(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _entry(row: tuple[Any, ...]) -> Entry:
    values = dict(zip(_COLUMNS, row, strict=True))
    path, kind = Path(os.fsdecode(values.pop("path"))), values.pop("kind")
    return Entry(path, SourceKind.__members__.get(kind), **values)
