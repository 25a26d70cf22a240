"""An adapter's conversion as people ask for it: its base found, its contract made, the store told.

The bytes are the work of `converters`; this module adds what only edgelora knows, the contract.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapter_contract import (
    ContractTerms,
    Settled,
    against,
    check_base,
    checked_template,
    contract_for,
    find_base,
    with_template,
)
from edgelora.adapter_ref import AdapterRef
from edgelora.adapter_settings import GENERAL, AdapterSettings
from edgelora.contract import FILE_NAME, Contract
from edgelora.errors import BaseNotFoundError, ModelFileError, SettingsError
from edgelora.repair import RepairPlan, check_settings, plan_repair
from edgelora.store import Store
from edgelora.version import __version__

if TYPE_CHECKING:
    from converters.adapter import AdapterReport, PreparedAdapter
    from converters.merge import Merged

Progress = Callable[[int, int, str], None]
FOLDERS_ONLY = ("--allow-bin", "--initial", "--certify")
WEIGHTS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", FILE_NAME)


@dataclass(frozen=True)
class AdapterRequest:
    """What to make of adapters.

    Attributes:
        base: a Hugging Face folder or a GGUF; None lets the store find it.
        chat_template: a built-in name or a Jinja file, instead of the adapter's own.
        force: replace the target where it exists, and convert for a base that the adapter was not made for.
        imatrix: how strongly the base's columns are used, for its repair.
    """

    settings: AdapterSettings = field(default_factory=AdapterSettings)
    base: Path | None = None
    chat_template: str | None = None
    force: bool = False
    imatrix: Path | None = None

    @property
    def terms(self) -> ContractTerms:
        return ContractTerms(self.chat_template, self.force)


def convert_adapter_source(
    source: Path, target: Path, request: AdapterRequest, store: Store, *, progress: Progress | None = None
) -> AdapterReport:
    """Make a GGUF adapter of a folder that PEFT or MLX saved, or of another GGUF adapter, and remember it.

    Raises:
        ConversionError, EdgeloraError: what is wrong; nothing is left behind.
    """
    check_settings(request.settings)
    with _prepared(source, request, store) as (prepared, settled):
        repair = _repair(source, request, settled.contract, store)
        before = [settled.contract.exactness] if source.is_file() else []
        exactness = _exactness(prepared, before)
        contract = settled.contract.with_changes(exactness=exactness)
        report = prepared.write(target, contract.to_metadata(), progress=progress, force=request.force)
    report = replace(report, method=str(exactness["method"]), kind=str(exactness["kind"]))
    report = repair.apply(report, contract, progress) if repair else report
    return _registered(replace(report, notices=(*settled.notices, *report.notices)), store)


def _repair(source: Path, request: AdapterRequest, contract: Contract, store: Store) -> RepairPlan | None:
    settings = request.settings
    if settings.repair_rank is not None and request.base is None and not source.is_dir():
        raise SettingsError("--repair-rank: of which base? Name the GGUF file that is served with --base")
    base = request.base or (find_base(source, None, store) if settings.repair_rank else source)
    return plan_repair(settings, request.imatrix, source, base, contract, store)


@contextmanager
def _prepared(source: Path, request: AdapterRequest, store: Store) -> Iterator[tuple[PreparedAdapter, Settled]]:
    from converters.adapter import prepare_adapter

    settings = request.settings
    if source.is_dir():
        base = find_base(source, request.base, store)
        settled = contract_for(source, base, store, request.terms)
        with prepare_adapter(source, base, settings.options(), known=store.known_base(base)) as prepared:
            yield prepared, replace(settled, contract=_certified(settled.contract, base, source, settings))
        return
    if unused := [name for name in settings.given() if name in FOLDERS_ONLY]:
        raise SettingsError(f"{', '.join(unused)}: for adapter folders, and {source} is a GGUF adapter")
    from converters.blend import Part, prepare_blend

    settled = _gguf_contract(source, request, store)
    with prepare_blend([Part(source, 1.0)], request.base, settings.options(), force=request.force) as prepared:
        yield prepared, settled


def _certified(contract: Contract, base: Path, source: Path, settings: AdapterSettings) -> Contract:
    """With what Hugging Face and PEFT compute, where that is asked for.

    Raises:
        SettingsError: the base is no folder that they could load.
        MissingExtraError: they are not installed.
    """
    if settings.certify is None:
        return contract
    if not base.is_dir():
        raise SettingsError(
            f"--certify runs transformers, which needs the base's own folder; {base} is a GGUF file",
            hint="Name the folder with --base.",
        )
    from edgelora.train.extra import require_extra

    require_extra("--certify")
    from edgelora.train import certify

    general = str(settings.certify) == GENERAL and not settings.certify.exists()
    return certify(contract, base, source, None if general else settings.certify)


def _gguf_contract(source: Path, request: AdapterRequest, store: Store) -> Settled:
    """The contract of a GGUF adapter, against the base that is named, if one is."""
    from converters.reader import read_header

    found = Contract.from_metadata(read_header(source).metadata, str(source)) or Contract(base_name=source.stem)
    if request.base is not None:
        return against(found, source, request.base, store, request.terms)
    return Settled(with_template(found, checked_template(request.chat_template) or found.chat_template))


def blend(
    adapters: Sequence[AdapterRef],
    target: Path,
    request: AdapterRequest,
    store: Store,
    *,
    way: str = "cat",
    progress: Progress | None = None,
) -> AdapterReport:
    """One GGUF adapter of several, each at its scale.

    Args:
        way: see `converters.blend`.

    Raises:
        ConversionError, EdgeloraError: what is wrong; nothing is left behind.
    """
    from converters.blend import Part, prepare_blend
    from edgelora.resolution import contract_of

    base = request.base or _common_base(adapters, store)
    contracts = [contract_of(adapter.path) or Contract() for adapter in adapters]
    if repairing := [str(each.path) for each, one in zip(adapters, contracts, strict=True) if one.repair]:
        raise SettingsError(
            f"{', '.join(repairing)}: repairs a base, which a blend would do more or less of",
            hint="Blend the adapters as they were trained, and repair the result: convert BLEND --repair-rank N.",
        )
    settled = _common_contract(adapters, contracts, base, store, request)
    parts = [Part(adapter.path, adapter.scale) for adapter in adapters]
    with prepare_blend(parts, base, request.settings.options(), way=way, force=request.force) as prepared:
        exactness = _exactness(prepared, [each.exactness for each in contracts])
        exactness |= {"blend": [[adapter.name, adapter.scale] for adapter in adapters], "way": way}
        contract = settled.contract.with_changes(exactness=exactness, base_fingerprint=prepared.base_fingerprint)
        report = prepared.write(target, contract.to_metadata(), progress=progress, force=request.force)
    report = replace(report, kind=str(exactness["kind"]), notices=(*settled.notices, *report.notices))
    return _registered(report, store)


def _common_base(adapters: Sequence[AdapterRef], store: Store) -> Path | None:
    """The base that a folder among them names or the store knows; None where all are GGUF files.

    Raises:
        BaseNotFoundError: none of the folders leads to one.
    """
    folders = [adapter.path for adapter in adapters if adapter.path.is_dir()]
    for folder in folders[:-1]:
        with suppress(BaseNotFoundError):
            return find_base(folder, None, store)
    return find_base(folders[-1], None, store) if folders else None


def _exactness(prepared: PreparedAdapter, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a contract says of a conversion; what was lost before stays said.

    Args:
        before: of the adapters that were read, from files that anybody may have written.
    """
    now = prepared.exactness()
    roundings = [value for each in before if isinstance(value := each.get("rounding"), float) and isfinite(value)]
    now["rounding"] = max([now["rounding"], *roundings])
    if any(each.get("kind") == "approximate" for each in before):
        now["kind"] = "approximate"
    if any(each.get("from_quantized") is True for each in before):
        now["from_quantized"] = True
    if len(before) == 1 and isinstance(method := before[0].get("method"), str):
        now["method"] = method
    return now


def _registered(report: AdapterReport, store: Store) -> AdapterReport:
    """Tell the store; the file is written and good, whatever the store says."""
    from converters.errors import ConversionError

    try:
        store.register_adapter(report.path)
    except (ConversionError, ModelFileError) as error:
        return replace(report, notices=(*report.notices, f"not remembered for later: {error.message}"))
    return report


def _common_contract(
    adapters: Sequence[AdapterRef],
    contracts: Sequence[Contract],
    base: Path | None,
    store: Store,
    request: AdapterRequest,
) -> Settled:
    """What all of the blended adapters agree on; nothing of one alone holds for their sum.

    Raises:
        BaseMismatchError: one of them was made for another base.
    """
    first = contracts[0]
    changes: dict[str, Any] = {"training": {}, "exactness": {}, "certificate": ""}
    for name in ("system", "stop", "sampling", "chat_template"):
        if any(getattr(other, name) != getattr(first, name) for other in contracts):
            changes[name] = getattr(Contract(), name)
    if "chat_template" in changes:
        changes |= {"golden_messages": (), "golden_tokens": ()}
    common = with_template(first.with_changes(**changes), checked_template(request.chat_template) or
                           changes.get("chat_template", first.chat_template))  # fmt: skip
    if base is None:
        return Settled(common)
    fingerprint = store.fingerprint(base)
    notices = [
        notice
        for adapter, contract in zip(adapters, contracts, strict=True)
        for notice in check_base(contract, adapter.path, base, fingerprint, force=request.force)
    ]
    settled = against(common.with_changes(base_fingerprint=fingerprint), base, base, store, request.terms)
    return replace(settled, notices=(*notices, *settled.notices))


@dataclass(frozen=True)
class MergeRequest:
    """Adapters to merge, the chat template that the last of them brings, and what should be known."""

    adapters: tuple[Merged, ...] = ()
    template: str = ""
    notices: tuple[str, ...] = ()


def merged_adapters(
    adapters: Sequence[AdapterRef], base: Path, settings: AdapterSettings, store: Store, *, force: bool
) -> MergeRequest:
    """Adapters to be merged into a base that they were made for.

    Raises:
        BaseMismatchError: one was made for another base.
    """
    from converters.merge import Merged
    from edgelora.resolution import contract_of

    template, notices = "", list[str]()
    for adapter in adapters:
        contract = contract_of(adapter.path)
        if contract is not None:
            notices += check_base(contract, adapter.path, base, store.fingerprint(base), force=force)
            template = contract.chat_template or template
    merged = [
        Merged(adapter.path, adapter.scale, allow_bin=settings.allow_bin, initial=settings.initial)
        for adapter in adapters
    ]
    return MergeRequest(tuple(merged), template, tuple(notices))


def adapter_from_folder(folder: Path, base: Path, store: Store, *, force: bool = False) -> Path:
    """The GGUF of a PEFT folder, made once for each content and kept in the store.

    With `force`, a folder that was trained on another base is converted all the same.

    Raises:
        ConversionError, ModelFileError: the folder cannot be converted, or the store cannot be written.
    """
    from converters.adapter import prepare_adapter

    known = store.known_base(base)
    check_base(Contract.load(folder) or Contract(), folder, base, known.fingerprint, force=force)
    target = store.adapter_path(_content_hash(folder, known.fingerprint))
    if not target.is_file():
        settled = contract_for(folder, base, store, ContractTerms(force=force))
        store.make_adapter_folder()
        with prepare_adapter(folder, base, known=known) as prepared:
            contract = settled.contract.with_changes(exactness=prepared.exactness())
            prepared.write(target, contract.to_metadata(), force=True)
    return target


def _content_hash(folder: Path, base_fingerprint: str) -> str:
    from converters.initialisation import initial_folder

    digest = hashlib.sha256(f"{__version__}\0{base_fingerprint}".encode())  # another version may convert otherwise
    initial = initial_folder(folder)
    folders = [folder] if initial is None else [folder, initial]
    for path in (each / name for each in folders for name in WEIGHTS):
        digest.update(f"\0{path.relative_to(folder)}\0".encode())
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
