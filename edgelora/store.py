"""Where bases and adapters are remembered, and how the base an adapter belongs to is found.

The store is one folder (`EDGELORA_HOME`, else `$XDG_DATA_HOME/edgelora`, else `~/.local/share/edgelora`):

    index.sqlite     bases and adapters of this machine: what `convert` made, what was added, what was looked at
    adapters/        GGUF adapters made on the fly from PEFT folders, named by content

The index is a cache and an address book: entries whose file changed are looked at again, a file that moved is known
again where it is seen next, and deleting the folder loses nothing but what `edgelora add` was told.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.detect import SourceKind
from edgelora.base_search import BASE_VARIABLE as BASE_VARIABLE
from edgelora.base_search import FoundBase as FoundBase
from edgelora.base_search import find_base
from edgelora.contract import Contract
from edgelora.discovery import SOURCES
from edgelora.entry import Entry, examine, place_of, state_of
from edgelora.errors import ModelFileError
from edgelora.store_index import Index, Move

if TYPE_CHECKING:
    from converters.adapted_base import Known

HOME_VARIABLE = "EDGELORA_HOME"
CONVERTED, ADDED, ON_THE_FLY = "convert", "added", "made on the fly"
Looking = Callable[[Path], None]  # told of each file before it is opened for the first time


def default_folder() -> Path:
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser()
    data_home = os.environ.get("XDG_DATA_HOME")
    return (Path(data_home) if data_home else Path.home() / ".local" / "share") / "edgelora"


class Store:
    """The store in `folder`; nothing is created before something is written.

    Attributes:
        notices: what should be told of the index and of files that could not be looked at.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        self._index = Index(self.folder)
        self._notices: list[str] = []

    @property
    def notices(self) -> list[str]:
        return [*self._index.notices, *self._notices]

    def notice(self, text: str) -> None:
        if text not in self._notices:
            self._notices.append(text)

    # Adapters made on the fly

    def adapter_path(self, content_hash: str) -> Path:
        """Where the GGUF made from a PEFT folder with this content belongs."""
        return self.folder / "adapters" / f"{content_hash}.gguf"

    def make_adapter_folder(self) -> None:
        """Raises ModelFileError where it cannot be made."""
        try:
            (self.folder / "adapters").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelFileError(
                f"the store at {self.folder} cannot be used ({error})",
                hint=f"Name another folder with {HOME_VARIABLE}.",
            ) from None

    # Remembering

    def register(self, path: Path) -> str:
        """Remember a GGUF base that `convert` wrote; its fingerprint is returned.

        Raises:
            ConversionError: not a base that can be read.
            ModelFileError: the index cannot be written.
        """
        fingerprint = self.fingerprint(path)
        self.remember([replace(self.look(path), origin=CONVERTED)])
        return fingerprint

    def register_adapter(self, path: Path) -> None:
        """Remember an adapter that `convert` wrote.

        Raises:
            ModelFileError: not an adapter that can be read, or the index cannot be written.
        """
        entry = self.look(path)
        if not entry.is_adapter:
            raise ModelFileError(entry.problem or f"{path} is a base, not an adapter")
        self.remember([replace(entry, origin=CONVERTED)])

    def remember(self, entries: Iterable[Entry]) -> None:
        """Write entries into the index; what moved with one of them is known again.

        Raises:
            ModelFileError: the index cannot be written.
        """
        for move in self._index.remember(entries):
            self._follow(move)

    def forget(self, paths: Iterable[Path]) -> None:
        """Raises:
        ModelFileError: the index cannot be written.
        """
        self._index.forget(paths)

    # Looking

    def look(self, path: Path) -> Entry:
        """What is at `path`, from the index where nothing changed; what cannot be used has a `problem`."""
        return self.look_all([path])[0]

    def look_all(self, paths: Iterable[Path], looking: Looking | None = None) -> list[Entry]:
        known = {entry.path: entry for entry in self.remembered()}
        entries, fresh = [], []
        for place in map(place_of, paths):
            entry = known.get(place)
            if entry is None or not entry.content or entry.state != state_of(place):
                if looking:
                    looking(place)
                entry = replace(examine(place), origin=entry.origin if entry else "")
                fresh.append(entry)
            entries.append(entry)
        if readable := [entry for entry in fresh if entry.content]:
            with suppress(ModelFileError):  # a store that cannot be written only costs the next start some time
                self.remember(readable)
        return entries

    def _follow(self, move: Move) -> None:
        """Where a file moved together with its folder, look for what else was in it."""
        old, new = _roots(move)
        gone = [entry.path for entry in self.registered() if old in entry.path.parents and not entry.is_there]
        others = [new / path.relative_to(old) for path in gone]
        self.look_all(path for path in others if path.exists())

    def remembered(self) -> list[Entry]:
        """Everything in the index, also what was only looked at; nothing where it cannot be read."""
        with suppress(ModelFileError):
            return list(self._index.entries().values())
        return []

    def registered(self) -> list[Entry]:
        """What `convert` wrote and what was added, also what is gone by now; the newest file first."""
        entries = [entry for entry in self.remembered() if entry.origin]
        return sorted(entries, key=lambda entry: _time_of(entry.path), reverse=True)

    def registered_bases(self) -> list[Path]:
        """The registered GGUF bases that are still there, the newest first; none where the index cannot be read."""
        return [entry.path for entry in self.registered() if entry.kind is SourceKind.GGUF_BASE and entry.is_there]

    def known(self, looking: Looking | None = None) -> list[Entry]:
        """Everything registered (also what is gone), made on the fly, or found in other programs' folders, each once.

        Raises:
            ModelFileError: the index was written by a newer edgelora, or cannot be read.
        """
        self._index.entries()
        registered = self.registered()
        there = self.look_all([entry.path for entry in registered if entry.is_there], looking)
        own = sorted((self.folder / "adapters").glob("*.gguf"))
        groups = [(ON_THE_FLY, "", path) for path in own]
        groups += [(s.origin, found.name, found.path) for s in SOURCES for found in s.found(self.notice)]
        looked = self.look_all([path for _, _, path in groups], looking)
        found = [replace(entry, origin=entry.origin or origin, name=name or entry.name)
                 for entry, (origin, name, _) in zip(looked, groups, strict=True)]  # fmt: skip
        gone = [entry for entry in self.registered() if not entry.is_there]
        self._forget_stale()
        return [*_each_once([*there, *found]), *gone]

    def _forget_stale(self) -> None:
        """What was only looked at, and is gone, is not kept."""
        if stale := [entry.path for entry in self.remembered() if not entry.origin and not entry.is_there]:
            with suppress(ModelFileError):
                self.forget(stale)

    def fingerprint(self, path: Path) -> str:
        """`converters.fingerprint` of a base, computed once for each state of its files.

        Raises:
            ConversionError: not a base that can be read.
        """
        return _fingerprint_of(self.look(path), path)

    def known_base(self, path: Path) -> Known:
        """What adapters are told of a base, found out once for each state of its files.

        Raises:
            ConversionError: not a base that can be read.
        """
        from converters.adapted_base import Known
        from converters.hub_cache import repository_of

        entry = self.look(path)
        is_its_own = entry.is_base and not repository_of(path)  # a snapshot of the hub is called by its repository here
        return Known(entry.name if is_its_own else "", _fingerprint_of(entry, path))

    def find_base(self, contract: Contract | None, adapter: Path) -> FoundBase:
        """The base that `adapter` was made for.

        Looked at in this order: `EDGELORA_BASE`, the GGUF files beside the adapter, the bases registered here, those
        in the folders of other programs (`discovery.SOURCES`). An adapter without a contract does not say what it
        fits: then `EDGELORA_BASE`, or the only base beside it, is taken on trust (the engine still checks every shape).

        Raises:
            BaseNotFoundError: nothing fits; the message says what is wanted, what was looked at and what to run.
        """
        return find_base(self, contract, adapter)


def _fingerprint_of(entry: Entry, path: Path) -> str:
    from converters.fingerprint import fingerprint

    return entry.fingerprint if entry.is_base and entry.fingerprint else fingerprint(path)


def _each_once(entries: Iterable[Entry]) -> list[Entry]:
    """The first of those that are one file behind links."""
    seen: dict[Path, Entry] = {}
    for entry in entries:
        seen.setdefault(entry.path.resolve(), entry)
    return list(seen.values())


def _roots(move: Move) -> tuple[Path, Path]:
    """The outermost folders that a move can be explained by: what both paths end in is taken off."""
    old, new = move.old, move.new
    while old.name == new.name and old.name:
        old, new = old.parent, new.parent
    return old, new


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
