"""Which known adapters fit which known bases: what `edgelora list` shows.

Fennick 2.6m (029e51d5ff30)      a model: all files whose fingerprint this is
  bases      q4_k_m, q8_0, the Hugging Face folder
  adapters   support, extract    made for that fingerprint, or naming one of these bases
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgelora.entry import Entry
from edgelora.store import ADDED, CONVERTED, Looking, Store

NAMED = "named by adapter"


@dataclass
class Model:
    """One base in all its files, and the adapters that want it.

    Attributes:
        name: what its files call it; without a file, what its adapters do.
        fingerprint: empty where adapters name a base that is not known, and do not say what it looks like.
    """

    name: str
    fingerprint: str
    bases: list[Entry] = field(default_factory=list)
    adapters: list[Entry] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        bases, adapters = ([entry_dict(entry) for entry in group] for group in (self.bases, self.adapters))
        return {"name": self.name, "fingerprint": self.fingerprint, "bases": bases, "adapters": adapters}


@dataclass(frozen=True)
class Listing:
    """Everything known.

    Attributes:
        models: those with a base here, the ones with adapters first.
        waiting: bases that are not here, and the adapters that want them.
        unclaimed: adapters that do not say which base they were made for.
        missing: registered, and gone from where they were.
        unusable: broken, or neither base nor adapter; each has a `problem`.
    """

    models: Sequence[Model]
    waiting: Sequence[Model]
    unclaimed: Sequence[Entry]
    missing: Sequence[Entry]
    unusable: Sequence[Entry]
    notices: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`; sizes in bytes."""
        groups = {name: [entry_dict(entry) for entry in getattr(self, name)]
                  for name in ("unclaimed", "missing", "unusable")}  # fmt: skip
        models = {name: [model.to_dict() for model in getattr(self, name)] for name in ("models", "waiting")}
        return {**models, **groups, "notices": list(self.notices)}


def entry_dict(entry: Entry) -> dict[str, Any]:
    """An entry as plain data; empty fields are left out."""
    values = {
        "path": str(entry.path),
        "kind": entry.kind.value if entry.kind else "",
        "name": entry.name,
        "detail": entry.detail,
        "fingerprint": entry.fingerprint,
        "base_name": entry.base_name,
        "size_bytes": entry.size_bytes,
        "origin": entry.origin,
        "problem": entry.problem,
    }
    return {key: value for key, value in values.items() if value}


def list_known(store: Store, looking: Looking | None = None) -> Listing:
    """Look at everything the store knows, and at what lies in the folders it looks into.

    Raises:
        ModelFileError: the index cannot be read.
    """
    entries = with_named_bases(store, store.known(looking))
    missing = [entry for entry in entries if not entry.is_there]
    there = [entry for entry in entries if entry.is_there]
    models, unclaimed = grouped(there)
    return Listing(
        models=[model for model in models if model.bases],
        waiting=[model for model in models if not model.bases],
        unclaimed=unclaimed,
        missing=missing,
        unusable=[entry for entry in there if entry.problem],
        notices=store.notices,
    )


def with_named_bases(store: Store, entries: Sequence[Entry], names: Iterable[str] = ()) -> list[Entry]:
    """`entries`, and the model folders on this machine that adapters of the user's (and `names`) call their base.

    What lies in other programs' folders is a stranger's: the paths it names are not looked at.
    """
    wanted = [entry.base_name for entry in entries if entry.is_adapter and entry.origin in (CONVERTED, ADDED)]
    named = [Path(name) for name in dict.fromkeys([*wanted, *names]) if name and is_model_folder(Path(name))]
    known = {entry.path for entry in entries}
    looked = [entry for entry in store.look_all(named) if entry.path not in known and not entry.problem]
    return [*entries, *(replace(entry, origin=entry.origin or NAMED) for entry in looked)]


def is_model_folder(path: Path) -> bool:
    return (path / "config.json").is_file()


def grouped(entries: Iterable[Entry]) -> tuple[list[Model], list[Entry]]:
    """Models, and the adapters that do not say which they want."""
    entries = list(entries)
    models: dict[str, Model] = {}  # by fingerprint; where an adapter says none, by the name it has for its base
    for entry in entries:
        if entry.is_base:
            models.setdefault(entry.fingerprint, Model(entry.name, entry.fingerprint)).bases.append(entry)
    by_name = {name: key for key, model in models.items() for base in model.bases for name in names_of(base)}
    unclaimed = []
    for entry in entries:
        key = entry.fingerprint or by_name.get(entry.base_name) or entry.base_name
        if entry.is_adapter and key:
            models.setdefault(key, Model(entry.base_name, entry.fingerprint)).adapters.append(entry)
        elif entry.is_adapter:
            unclaimed.append(entry)
    for model in models.values():
        model.bases.sort(key=lambda entry: (entry.path.is_dir(), entry.size_bytes, entry.path))
        model.adapters.sort(key=lambda entry: (entry.name, entry.path))
    return sorted(models.values(), key=lambda model: (not model.adapters, model.name.lower())), unclaimed


def names_of(base: Entry) -> tuple[str, str]:
    """What an adapter's configuration may call a base."""
    return base.name, str(base.path)
