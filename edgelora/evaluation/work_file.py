"""What a run has worked out, kept by content between runs: replies, likelihoods, a judge's verdicts.

One SQLite file, one table: the hash of everything that a result depends on, and the result as JSON. A run that was
killed loses no finished result, whatever the moment; a second one asks for what it needs and computes what is missing,
also where rows, adapters or metrics are others by then.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgelora.errors import DataFileError
from edgelora.version import __version__

_APPLICATION_ID = 0x456C4576  # "ElEv": tells a file of ours from any other SQLite file


def digest(*parts: Any) -> str:
    """The hash of some JSON, which names a result. Another version of edgelora may work it out otherwise."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class WorkFile:
    """Results by the hash of what they depend on. A context manager; one process at a time.

    Args:
        path: None keeps everything in memory.

    Raises:
        DataFileError: it cannot be written, is in use, or is another program's file.
    """

    def __init__(self, path: Path | None) -> None:
        self._name = str(path or "the results")
        try:
            self._db = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=0.2, check_same_thread=False)
            self._open()
        except sqlite3.Error as error:
            raise self._failed(error) from None

    def _open(self) -> None:
        (found,) = self._db.execute("PRAGMA application_id").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and found != _APPLICATION_ID:
            raise sqlite3.DatabaseError("another program's file")
        # In WAL mode nothing waits for the disk, and what a killed process has written is there.
        self._db.executescript(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; BEGIN IMMEDIATE;"
            f"PRAGMA application_id = {_APPLICATION_ID};"
            "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID; COMMIT;"
        )

    def get(self, key: str) -> Any:
        """A result, None where there is none yet."""
        try:
            found = self._db.execute("SELECT value FROM results WHERE key = ?", [key]).fetchone()
            return None if found is None else json.loads(found[0])
        except (sqlite3.Error, ValueError) as error:
            raise self._failed(error) from None

    def put(self, key: str, value: Any) -> None:
        """Keep a result.

        Raises:
            DataFileError: the disk is full or gone; what was kept before stays.
        """
        try:
            self._db.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", [key, json.dumps(value)])
        except sqlite3.Error as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> DataFileError:
        if "locked" in str(error):
            return DataFileError(
                f"{self._name}: another process is writing it", hint="Wait for it to end, or name another folder: -o."
            )
        return DataFileError(
            f"{self._name}: {error}", hint="It holds what earlier runs worked out. Name another folder with -o."
        )

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
