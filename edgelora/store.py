"""Where bases and adapters are remembered, and how the base an adapter belongs to is found.

The store is one folder (`EDGELORA_HOME`, else `$XDG_DATA_HOME/edgelora`, else `~/.local/share/edgelora`):

    index.sqlite     the GGUF bases this machine has, by path, with their fingerprints
    adapters/        GGUF adapters made on the fly from PEFT folders, named by content

The index is a cache and an address book: entries whose file moved or changed are looked at again or ignored, and
deleting the folder loses nothing but that.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from converters.errors import ConversionError
from edgelora.contract import Contract
from edgelora.errors import BaseNotFoundError, EdgeloraError, ModelFileError

BASE_VARIABLE = "EDGELORA_BASE"
HOME_VARIABLE = "EDGELORA_HOME"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS bases (
    path        TEXT PRIMARY KEY,
    size_bytes  INTEGER NOT NULL,
    mtime_ns    INTEGER NOT NULL,
    fingerprint TEXT NOT NULL,
    registered  INTEGER NOT NULL DEFAULT 0
)
"""


def default_folder() -> Path:
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser()
    data_home = os.environ.get("XDG_DATA_HOME")
    return (Path(data_home) if data_home else Path.home() / ".local" / "share") / "edgelora"


@dataclass(frozen=True)
class FoundBase:
    """A base file and how it was found, for the notice on stderr."""

    path: Path
    how: str


class Store:
    """The store in `folder`; nothing is created before something is written."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def adapter_path(self, content_hash: str) -> Path:
        """Where the GGUF made from a PEFT folder with this content belongs."""
        return self.folder / "adapters" / f"{content_hash}.gguf"

    def make_adapter_folder(self) -> None:
        """Raises ModelFileError where it cannot be made."""
        try:
            (self.folder / "adapters").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def register(self, path: Path) -> str:
        """Remember a GGUF base; its fingerprint is returned."""
        fingerprint = self.fingerprint(path)
        self._remember(path.resolve(), path.stat(), fingerprint)
        with self._writing() as connection:
            connection.execute("UPDATE bases SET registered = 1 WHERE path = ?", (str(path.resolve()),))
        return fingerprint

    def registered_bases(self) -> list[Path]:
        """The remembered bases that are still there, the newest file first; none where the index cannot be read.

        The index is a cache: what is lost with it is found again by the next `convert`.
        """
        with suppress(ModelFileError):
            return self._registered_bases()
        return []

    def _registered_bases(self) -> list[Path]:
        with self._reading() as connection:
            rows = connection.execute("SELECT path FROM bases WHERE registered = 1 ORDER BY mtime_ns DESC").fetchall()
        return [path for (text,) in rows if (path := Path(text)).is_file()]

    def fingerprint(self, path: Path) -> str:
        """`converters.fingerprint` of a base, computed once for each state of the file.

        Raises:
            ConversionError: not a base that can be read.
        """
        from converters.fingerprint import fingerprint

        path = path.resolve()
        if path.is_dir():
            return fingerprint(path)
        stat = path.stat()
        with suppress(ModelFileError):
            if known := self._lookup(path, stat):
                return known
        computed = fingerprint(path)
        with suppress(ModelFileError):  # a store that cannot be written only costs the next start some time
            self._remember(path, stat, computed)
        return computed

    def _remember(self, path: Path, stat: os.stat_result, fingerprint: str) -> None:
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO bases (path, size_bytes, mtime_ns, fingerprint) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (path) DO UPDATE SET size_bytes = excluded.size_bytes, mtime_ns = excluded.mtime_ns, "
                "fingerprint = excluded.fingerprint",
                (str(path), stat.st_size, stat.st_mtime_ns, fingerprint),
            )

    def _lookup(self, path: Path, stat: os.stat_result) -> str:
        with self._reading() as connection:
            row = connection.execute(
                "SELECT fingerprint FROM bases WHERE path = ? AND size_bytes = ? AND mtime_ns = ?",
                (str(path), stat.st_size, stat.st_mtime_ns),
            ).fetchone()
        return str(row[0]) if row else ""

    def find_base(self, contract: Contract | None, adapter: Path) -> FoundBase:
        """The base that `adapter` was made for.

        Looked at in this order: `EDGELORA_BASE`, the GGUF files beside the adapter, the bases remembered here. An
        adapter without a contract does not say what it fits: then `EDGELORA_BASE`, or the only base beside it, is
        taken on trust (the engine still checks every shape).

        Raises:
            BaseNotFoundError: nothing fits; the message says what is wanted, what was looked at and what to run.
        """
        looked = _unusable_variable()
        candidates = list(self._candidates(adapter))
        if contract is None or not contract.base_fingerprint:
            trusted = [c for c in candidates if c.how != _HOW_STORE]
            if len(trusted) == 1 or (trusted and trusted[0].how == _HOW_VARIABLE):
                return trusted[0]
            looked += [str(c.path) for c in trusted]
        else:
            for candidate in candidates:
                fits, note = self._fits(candidate.path, contract.base_fingerprint)
                if fits:
                    return candidate
                looked.append(f"{candidate.path} ({note})")
        raise _not_found(adapter, contract, looked)

    def _candidates(self, adapter: Path) -> Iterator[FoundBase]:
        seen: set[Path] = {adapter.resolve()}
        groups = [
            (_HOW_VARIABLE, _from_variable()),
            (_HOW_BESIDE, _gguf_beside(adapter)),
            (_HOW_STORE, self.registered_bases()),
        ]
        for how, paths in groups:
            for path in paths:
                if path.resolve() not in seen and _is_base(path):
                    seen.add(path.resolve())
                    yield FoundBase(path, how)

    def _fits(self, path: Path, fingerprint: str) -> tuple[bool, str]:
        try:
            found = self.fingerprint(path)
        except (ConversionError, EdgeloraError, OSError) as error:
            return False, str(error)
        return found == fingerprint, f"fingerprint {found[:12]}"

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The index, read-only; an empty one where there is none yet."""
        path = self.folder / "index.sqlite"
        try:
            if path.is_file():
                source = f"{path.resolve().as_uri()}?mode=ro"
                with closing(sqlite3.connect(source, uri=True, timeout=30)) as connection:
                    yield connection
            else:
                with closing(sqlite3.connect(":memory:")) as connection:
                    connection.execute(_SCHEMA)
                    yield connection
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        path = self.folder / "index.sqlite"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path, timeout=30)) as connection, connection:
                connection.execute(_SCHEMA)
                yield connection
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> ModelFileError:
        return ModelFileError(
            f"the store at {self.folder} cannot be used ({error})",
            hint=f"Name another folder with {HOME_VARIABLE}, or delete index.sqlite in it to start again.",
        )


_HOW_VARIABLE = f"named by {BASE_VARIABLE}"
_HOW_BESIDE = "found beside the adapter"
_HOW_STORE = "known from an earlier convert"


def _unusable_variable() -> list[str]:
    return [f"{path}, {_HOW_VARIABLE} (not a GGUF base)" for path in _from_variable() if not _is_base(path)]


def _from_variable() -> list[Path]:
    value = os.environ.get(BASE_VARIABLE)
    return [Path(value).expanduser()] if value else []


def _gguf_beside(adapter: Path) -> list[Path]:
    """GGUF files in the adapter's folder (for a PEFT folder: in it and beside it), the newest first."""
    folders = [adapter, adapter.resolve().parent] if adapter.is_dir() else [adapter.resolve().parent]
    found = [path for folder in folders for path in folder.glob("*.gguf") if path.is_file()]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _is_base(path: Path) -> bool:
    """Whether it can be opened as a base: of one in several parts, the first stands for all."""
    from converters.reader import read_header

    try:
        if not path.is_file():
            return False
        header = read_header(path)
        return header.kind == "base" and not header.metadata.get("split.no")
    except ConversionError:
        return False


def _not_found(adapter: Path, contract: Contract | None, looked: list[str]) -> BaseNotFoundError:
    if contract is None or not contract.base_fingerprint:
        wants = f"{adapter} does not say which base it was made for"
        hint = "Name it with --base BASE.gguf."
    else:
        name = contract.base_name or "its base"
        wants = (
            f"{adapter} was made for {name} (fingerprint {contract.base_fingerprint[:12]}), and no GGUF of it was found"
        )
        hint = f"Make one with `edgelora convert {name}`, or name it with --base BASE.gguf."
    seen = "looked at: " + (
        "; ".join(looked) if looked else "no other GGUF beside it, none known from an earlier convert"
    )
    return BaseNotFoundError(f"{wants}\n{seen}", hint=hint)
