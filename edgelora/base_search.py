"""Finding the base an adapter belongs to: where it is looked for, in which order, and what is said when none fits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.detect import SourceKind
from converters.errors import MAX_LISTED, ConversionError
from edgelora.contract import Contract
from edgelora.discovery import SOURCES, Source
from edgelora.entry import Entry, place_of
from edgelora.errors import BaseNotFoundError

if TYPE_CHECKING:
    from edgelora.store import Store

BASE_VARIABLE = "EDGELORA_BASE"
_VARIABLE, _BESIDE = f"named by {BASE_VARIABLE}", "found beside the adapter"
_HOW: Mapping[str, str] = {"convert": "known from an earlier convert", "added": "known from `edgelora add`"}
_TRUSTED = (_VARIABLE, _BESIDE)  # where an adapter that does not say what it fits takes its base from


@dataclass(frozen=True)
class FoundBase:
    """A base file and how it was found, for the notice on stderr."""

    path: Path
    how: str


def find_base(store: Store, contract: Contract | None, adapter: Path) -> FoundBase:
    """See `Store.find_base`."""
    wanted = contract.base_fingerprint if contract else ""
    looked: list[tuple[str, str]] = []
    trusted: list[FoundBase] = []
    for found, entry in _candidates(store, adapter, only_trusted=not wanted):
        if entry.kind is not SourceKind.GGUF_BASE:
            if found.how == _VARIABLE:
                looked.append((found.how, f"{found.path} (not a GGUF base)"))
        elif wanted and entry.fingerprint == wanted:
            return found
        else:
            trusted.append(found)
            note = f"fingerprint {entry.fingerprint[:12]}" if entry.fingerprint else entry.problem
            looked.append((found.how, f"{found.path} ({note})" if wanted else str(found.path)))
    if not wanted:  # a bundle is nobody's base
        trusted = [found for found in trusted if found.how == _VARIABLE or not _is_bundle(found.path)]
    if not wanted and trusted and (len(trusted) == 1 or trusted[0].how == _VARIABLE):
        return trusted[0]
    raise _not_found(store, adapter, contract, looked)


def _candidates(store: Store, adapter: Path, *, only_trusted: bool) -> Iterator[tuple[FoundBase, Entry]]:
    """Files that may be bases, each once, in the order in which they are taken."""
    seen = {adapter.resolve()}
    groups = [(_VARIABLE, _from_variable()), (_BESIDE, _gguf_beside(adapter))]
    for how, path in [*_flat(groups), *([] if only_trusted else _remembered(store))]:
        place = place_of(path)
        if place.resolve() not in seen:
            seen.add(place.resolve())
            first = path if path.is_dir() else path.with_name(place.name)  # of parts, the first stands for all
            yield FoundBase(first, how), store.look(place)
    for source in () if only_trusted else SOURCES:
        for found in source.found(store.notice):
            if found.path.resolve() not in seen:
                seen.add(found.path.resolve())
                yield FoundBase(found.path, _how(source)), store.look(found.path)


def _flat(groups: Iterable[tuple[str, list[Path]]]) -> list[tuple[str, Path]]:
    return [(how, path) for how, paths in groups for path in paths]


def _remembered(store: Store) -> list[tuple[str, Path]]:
    return [(_HOW[entry.origin], entry.path) for entry in store.registered() if entry.is_there]


def _from_variable() -> list[Path]:
    value = os.environ.get(BASE_VARIABLE)
    return [Path(value).expanduser()] if value else []


def _is_bundle(path: Path) -> bool:
    from converters.base_file import read_base_header
    from edgelora.bundle_reading import is_bundle

    try:
        return is_bundle(read_base_header(path))
    except ConversionError:
        return False


def _gguf_beside(adapter: Path) -> list[Path]:
    """GGUF files in the adapter's folder (for a PEFT folder: in it and beside it), the newest first."""
    folders = [adapter, adapter.resolve().parent] if adapter.is_dir() else [adapter.resolve().parent]
    found = [path for folder in folders for path in folder.glob("*.gguf") if path.is_file()]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _not_found(
    store: Store, adapter: Path, contract: Contract | None, looked: list[tuple[str, str]]
) -> BaseNotFoundError:
    if contract is None or not contract.base_fingerprint:
        message = f"{adapter} does not say which base it was made for"
        return BaseNotFoundError(f"{message}\n{_report(looked, _TRUSTED)}", hint="Name it with --base BASE.gguf.")
    name, fingerprint = contract.base_name or "its base", contract.base_fingerprint
    message = f"{adapter} was made for {name} (fingerprint {fingerprint[:12]}), and no GGUF of it was found"
    folder = next((entry.path for entry in store.remembered() if _is_folder_of(entry, fingerprint)), None)
    source = folder or contract.base_name or "its Hugging Face folder"
    hint = f"Make one with `edgelora convert {source}`, or name it with --base BASE.gguf."
    return BaseNotFoundError(f"{message}\n{_report(looked, (*_TRUSTED, *_HOW.values(), *_elsewhere()))}", hint=hint)


def _is_folder_of(entry: Entry, fingerprint: str) -> bool:
    return entry.kind is SourceKind.HF_BASE and entry.fingerprint == fingerprint and entry.is_there


def _how(source: Source) -> str:
    return f"found in {source.place}"


def _elsewhere() -> list[str]:
    return [_how(source) for source in SOURCES]


def _report(looked: list[tuple[str, str]], places: Iterable[str]) -> str:
    """A line for each place that was looked at, what was there or that nothing was."""
    lines = []
    for how in places:
        there = [text for place, text in looked if place == how]
        if there or how != _VARIABLE:
            more = f"; and {len(there) - MAX_LISTED} more" if len(there) > MAX_LISTED else ""
            lines.append(f"\n  - {how.removeprefix('found ')}: {'; '.join(there[:MAX_LISTED]) or 'no GGUF base'}{more}")
    return "looked at:" + "".join(lines)
