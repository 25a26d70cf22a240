"""From what a user names to files an engine can load: PEFT folders become GGUF adapters, and the base is found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgelora.adapter_ref import AdapterRef
from edgelora.contract import Contract
from edgelora.errors import ModelFileError, SettingsError
from edgelora.store import BASE_VARIABLE, FoundBase, Store


@dataclass(frozen=True)
class ResolvedFiles:
    """A GGUF base, GGUF adapters, and how the base was found (empty where it was named). Adapters that a bundle has
    inside are none of them."""

    base: Path
    adapters: tuple[AdapterRef, ...]
    base_note: str


def resolve_files(
    adapters: Sequence[AdapterRef], base: Path | None, store: Store | None = None, *, force: bool = False
) -> ResolvedFiles:
    """Find the base (the first adapter's, where none is named) and convert PEFT folders into the store.

    Raises:
        SettingsError: two adapters of one name.
        BaseNotFoundError: no base was named and none fits.
        ConversionError: a file is missing, damaged, or of the wrong kind.
    """
    from converters.detect import SourceKind, detect
    from edgelora.adapter_conversion import adapter_from_folder

    store = store or Store()
    names = [adapter.name for adapter in adapters]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"two adapters are called {', '.join(twice)}", hint="Give them names: NAME=PATH.")
    adapters = _not_inside(adapters, base)
    kinds = {adapter.path: detect(adapter.path) for adapter in adapters}
    for path, kind in kinds.items():
        if kind not in (SourceKind.GGUF_ADAPTER, SourceKind.PEFT_ADAPTER):
            raise ModelFileError(f"{path} is a base, not an adapter", hint=f"Use it as the base: --base {path}")
    note = ""
    if base is None:
        found = _find(adapters, store)
        base, note = found.path, f"Base: {found.path} ({found.how})."
    _require_base(base)
    ready = tuple(
        replace(a, path=adapter_from_folder(a.path, base, store, force=force))
        if kinds[a.path] is SourceKind.PEFT_ADAPTER
        else a
        for a in adapters
    )
    return ResolvedFiles(base, ready, note)


def _not_inside(adapters: Sequence[AdapterRef], base: Path | None) -> list[AdapterRef]:
    """The adapters that are files; those that are named as the base, a bundle, has them are left out.

    Raises:
        SettingsError: one of a bundle at a scale.
    """
    from converters.base_file import read_base_header
    from edgelora.bundle_reading import bundled_adapters

    named = [adapter for adapter in adapters if not adapter.path.exists()]
    if not named or base is None or not base.is_file():
        return [*adapters]
    inside = {each.name for each in bundled_adapters(read_base_header(base))}
    taken = [adapter for adapter in named if adapter.name == str(adapter.path) and adapter.name in inside]
    if scaled := [adapter for adapter in taken if adapter.scale != 1.0]:
        raise SettingsError(
            f"adapter {scaled[0].name} is in {base} for good: it cannot be scaled there",
            hint="Bundle it again at that scale: --adapter NAME=PATH@SCALE.",
        )
    return [adapter for adapter in adapters if adapter not in taken]


def contract_of(path: Path) -> Contract | None:
    """The contract of a GGUF adapter or a PEFT folder, None where it has none."""
    from converters.reader import read_header

    return Contract.load(path) if path.is_dir() else Contract.from_metadata(read_header(path).metadata, str(path))


def _find(adapters: Sequence[AdapterRef], store: Store) -> FoundBase:
    if not adapters:
        return _bare_base(store)
    contracts = [(adapter.path, contract_of(adapter.path)) for adapter in adapters]
    path, contract = next((pair for pair in contracts if pair[1] and pair[1].base_fingerprint), contracts[0])
    return store.find_base(contract, path)


def _bare_base(store: Store) -> FoundBase:
    if named := os.environ.get(BASE_VARIABLE):
        return FoundBase(Path(named).expanduser(), f"named by {BASE_VARIABLE}")
    known = "".join(f"\n  {path}" for path in store.registered_bases())
    hint = (
        f"Name one with --base; known from earlier converts:{known}"
        if known
        else "Name one with --base, or make one: edgelora convert HF_FOLDER"
    )
    raise SettingsError("no base and no adapter named", hint=hint)


def _require_base(path: Path) -> None:
    from converters.detect import SourceKind, detect

    kind = detect(path)
    if kind is SourceKind.HF_BASE:
        raise ModelFileError(
            f"{path} is a Hugging Face folder; llama.cpp runs GGUF files", hint=f"Convert it: edgelora convert {path}"
        )
    if kind is not SourceKind.GGUF_BASE:
        raise ModelFileError(f"{path} is an adapter, not a base", hint=f"Use it as the adapter: --adapter {path}")
