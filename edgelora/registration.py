"""`edgelora add` and `edgelora remove`: which files the store is told of, and which it forgets; and known names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converters.detect import EXPECTED, detect
from converters.errors import listed
from edgelora.discovery import SOURCES, Walk
from edgelora.entry import Entry, place_of
from edgelora.errors import ModelFileError
from edgelora.store import ADDED, Looking, Store


@dataclass(frozen=True)
class Removed:
    """What was forgotten; `is_deleted` where the file was the store's own, made on the fly."""

    entry: Entry
    is_deleted: bool


def add(store: Store, paths: Sequence[Path], looking: Looking | None = None) -> list[Entry]:
    """Remember files, and what is in folders: each that is a base or an adapter by itself, and all below it.

    What is in a folder and cannot be used becomes one of the store's notices.

    Raises:
        ModelFileError: one of `paths` is no base or adapter, or has none in it: then nothing is remembered; or the
            index cannot be written.
    """
    problems: list[str] = []
    entries: dict[Path, Entry] = {}
    for path in paths:
        found = _below(store, path, looking) if path.is_dir() else [store.look(path)]
        if not path.is_dir():
            problems += [entry.problem for entry in found if entry.problem]
        elif not found:
            problems.append(f"{path}: no base or adapter in this folder")
        entries |= {entry.path: replace(entry, origin=entry.origin or ADDED) for entry in found}
    if problems:
        told = f" ({'; '.join(store.notices)})" if store.notices else ""
        raise ModelFileError(f"nothing was added:{listed(problems)}{told}", hint=EXPECTED)
    store.remember(entries.values())
    return list(entries.values())


def _below(store: Store, folder: Path, looking: Looking | None) -> list[Entry]:
    seen = store.look_all(Walk(None, store.notice).models_in(folder), looking)
    for entry in seen:
        if entry.problem:
            store.notice(f"not added: {entry.problem}")
    return [entry for entry in seen if not entry.problem]


def remove(store: Store, names: Sequence[str]) -> list[Removed]:
    """Forget what was registered. Users' files stay; GGUFs in the store's own folder are deleted.

    Args:
        names: paths of files, folders (all that is registered below), or names as `edgelora list` shows them.

    Raises:
        ModelFileError: a name is unknown, belongs to another program, or stands for several; nothing is forgotten.
    """
    known, problems = store.known(), []
    wanted: dict[Path, Entry] = {}
    for name in names:
        there = by_path(name, known)
        entries = there or by_name(name, known)
        if problem := _problem(name, entries, is_path=bool(there)):
            problems.append(problem)
        wanted |= {entry.path: entry for entry in entries}
    if problems:
        raise ModelFileError(f"nothing was removed:{listed(problems)}", hint="Run `edgelora list` for what is known.")
    store.forget(wanted)
    return [Removed(entry, _delete_own(store, entry)) for entry in wanted.values()]


def _delete_own(store: Store, entry: Entry) -> bool:
    is_own = entry.path.parent == place_of(store.folder / "adapters")
    if is_own:
        entry.path.unlink(missing_ok=True)
    return is_own


def _problem(name: str, entries: Sequence[Entry], *, is_path: bool) -> str:
    foreign = [source.place for source in SOURCES if any(entry.origin == source.origin for entry in entries)]
    if not entries:
        return f"{name}: not known"
    if foreign:
        return f"{name}: lies in {' and '.join(foreign)}, where edgelora only reads"
    if len(entries) > 1 and not is_path:
        return f"{name}: stands for several, name one by its path: {', '.join(str(entry.path) for entry in entries)}"
    return ""


def find(store: Store, name: str) -> Path:
    """A path as it is given, if something is there; else that of the one known base or adapter of this name.

    Raises:
        ConversionError, ModelFileError: neither.
    """
    path = Path(name).expanduser()
    entries = [] if path.exists() else [entry for entry in by_name(name, store.known()) if entry.is_there]
    if len(entries) > 1:
        several = listed([str(entry.path) for entry in entries])
        raise ModelFileError(f"{name!r} stands for several files:{several}", hint="Name one of them.")
    if not entries:
        detect(path)  # says what is wrong with it
    return entries[0].path if entries else path


def by_path(name: str, known: Iterable[Entry]) -> list[Entry]:
    """The entry at this path, or all below this folder."""
    place = place_of(Path(name).expanduser())
    return [entry for entry in known if place in (entry.path, *entry.path.parents)]


def by_name(name: str, known: Iterable[Entry]) -> list[Entry]:
    """Entries of this name: their own, or that of their file with or without its ending."""
    return [entry for entry in known if name in (entry.name, entry.path.stem, entry.path.name)]
