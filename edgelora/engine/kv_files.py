"""KV that outlives the process: what sequences held when an engine ended, in a folder that the user named.

    KEY.kv:  a line of JSON (what it is, its key, tokens, size and digest of the state), then the state's bytes

A file belongs to one base content, KV type and build of llama.cpp; others are left alone. It holds the tokens of
conversations, so it is readable by its owner alone. The least recently used go where they take more than the budget.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.engine.cache import Kept, Key
from edgelora.engine.context import State
from edgelora.errors import SettingsError
from edgelora.whole_file import whole_file

SUFFIX = ".kv"
MAX_HEADER_BYTES = 1 << 24


@dataclass(frozen=True)
class _Header:
    """The first line of a file."""

    owner: str
    key: Key
    begins: int
    tokens: tuple[int, ...]
    exact: int
    size: int
    digest: str
    tenant: str | None
    public: int


class KVFiles:
    """The files of one base in a folder.

    Args:
        owner: what the KV depends on beside adapters and tokens: base content, KV type, build of llama.cpp.
        budget_bytes: of all files of this owner.

    Raises:
        SettingsError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, owner: str, budget_bytes: int) -> None:
        self.folder, self._owner, self._budget = folder, owner, budget_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"cache_dir {folder}: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise SettingsError(f"cache_dir {folder}: cannot be written")

    def entries(self) -> list[Kept]:
        """What earlier engines left, the most recently used last; their states are read when they are wanted."""
        return [
            Kept(
                header.key,
                header.begins,
                header.tokens,
                header.exact,
                _Reader(path, header),
                tenant=header.tenant,
                public=header.public,
            )
            for path, header in self._own()
        ]

    def save(self, held: Iterable[Kept]) -> None:
        """Write what is not there yet, whole files only, and make room for it. A full disk costs the rest of it."""
        with suppress(OSError):
            for each in held:
                self._write(each)
        files = list(self._own())
        excess = sum(path.stat().st_size for path, _ in files) - self._budget
        for path, _ in files:
            if excess <= 0:
                return
            excess -= path.stat().st_size
            path.unlink(missing_ok=True)

    def _write(self, each: Kept) -> None:
        named = json.dumps([self._owner, each.key, each.begins, list(each.tokens), each.exact, each.tenant])
        path = self.folder / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}{SUFFIX}"
        if path.exists():
            os.utime(path)
            return
        state = each.state()
        if state is None or state.nbytes > self._budget:
            return
        header = {
            "owner": self._owner,
            "key": each.key,
            "begins": each.begins,
            "tokens": list(each.tokens),
            "exact": each.exact,
            "tenant": each.tenant,
            "public": each.public,
            "size": state.nbytes,
            "digest": hashlib.sha256(state.tobytes()).hexdigest(),
        }
        with whole_file(path, mode=0o600) as file:
            file.write(json.dumps(header).encode() + b"\n")
            file.write(state.tobytes())

    def _own(self) -> Iterator[tuple[Path, _Header]]:
        """The files of this owner, the least recently used first."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(OSError, ValueError, TypeError, KeyError):
                header = _read_header(path)
                if header.owner == self._owner:
                    found.append((path.stat().st_mtime_ns, path, header))
        yield from ((path, header) for _, path, header in sorted(found, key=lambda each: each[:2]))


class _Reader:
    """The state in a file, or None where it is gone or damaged: then its tokens are read again."""

    def __init__(self, path: Path, header: _Header) -> None:
        self._path, self._header = path, header

    def __call__(self) -> State | None:
        with suppress(OSError):
            with open(self._path, "rb") as file:
                file.readline(MAX_HEADER_BYTES)
                data = file.read(self._header.size + 1)
            if len(data) == self._header.size and hashlib.sha256(data).hexdigest() == self._header.digest:
                os.utime(self._path)
                return np.frombuffer(data, np.uint8)
            self._path.unlink(missing_ok=True)
        return None


def _read_header(path: Path) -> _Header:
    with open(path, "rb") as file:
        values: dict[str, Any] = json.loads(file.readline(MAX_HEADER_BYTES))
    key = tuple((str(digest), float(scale)) for digest, scale in values["key"])
    tokens = tuple(int(token) for token in values["tokens"])
    numbers = (int(values[name]) for name in ("begins", "exact", "size"))
    begins, exact, size = numbers
    if not 0 <= exact <= len(tokens) or size <= 0:
        raise ValueError("no header of ours")
    tenant, public = values["tenant"], int(values["public"])
    if not isinstance(tenant, str | None):
        raise ValueError("no header of ours")
    return _Header(str(values["owner"]), key, begins, tokens, exact, size, str(values["digest"]), tenant, public)
