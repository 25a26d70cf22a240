"""An adapter's conversion as people ask for it: its base found, its contract made, the store told.

The bytes are the work of `converters`; this module adds what only edgelora knows, the contract.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapter_ref import AdapterRef
from edgelora.adapter_settings import GENERAL, AdapterSettings
from edgelora.contract import FILE_NAME, GOLDEN_MESSAGES, Contract
from edgelora.errors import BaseMismatchError, BaseNotFoundError, ModelFileError, SettingsError
from edgelora.messages import Message
from edgelora.store import Store
from edgelora.template import ChatTemplate, resolve
from edgelora.version import __version__

if TYPE_CHECKING:
    from converters.adapter import AdapterReport, PreparedAdapter
    from converters.merge import Merged

Progress = Callable[[int, int, str], None]
WEIGHTS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", FILE_NAME)


@dataclass(frozen=True)
class AdapterRequest:
    """What to make of adapters.

    Attributes:
        base: a Hugging Face folder or a GGUF; None lets the store find it.
        chat_template: a built-in name or a Jinja file, instead of the adapter's own.
        force: replace the target where it exists, and convert for a base that the adapter was not made for.
    """

    settings: AdapterSettings = field(default_factory=AdapterSettings)
    base: Path | None = None
    chat_template: str | None = None
    force: bool = False


def convert_adapter_source(
    source: Path, target: Path, request: AdapterRequest, store: Store, *, progress: Progress | None = None
) -> AdapterReport:
    """Make a GGUF adapter of a folder that PEFT or MLX saved, or of another GGUF adapter, and remember it.

    Raises:
        ConversionError, EdgeloraError: what is wrong; nothing is left behind.
    """
    with _prepared(source, request, store) as (prepared, contract):
        before = [contract.exactness] if source.is_file() else []
        contract = contract.with_changes(exactness=_exactness(prepared, before))
        report = prepared.write(target, contract.to_metadata(), progress=progress, force=request.force)
    return _registered(report, store)


@contextmanager
def _prepared(source: Path, request: AdapterRequest, store: Store) -> Iterator[tuple[PreparedAdapter, Contract]]:
    from converters.adapter import prepare_adapter
    from converters.blend import Part, prepare_blend

    if source.is_dir():
        base = find_base(source, request.base, store)
        contract = contract_for(source, base, store, chat_template=request.chat_template, force=request.force)
        known = store.fingerprint(base)
        with prepare_adapter(source, base, request.settings.options(), fingerprint=known) as prepared:
            yield prepared, _certified(contract, base, source, request.settings)
        return
    if request.settings.certify:
        raise SettingsError(
            "--certify runs PEFT, which needs the adapter's folder", hint=f"{source} is a GGUF adapter."
        )
    contract = _gguf_contract(source, request, store)
    with prepare_blend([Part(source, 1.0)], request.base, request.settings.options()) as prepared:
        yield prepared, contract


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


def _gguf_contract(source: Path, request: AdapterRequest, store: Store) -> Contract:
    """The contract of a GGUF adapter, against the base that is named, if one is."""
    from converters.reader import read_header

    found = Contract.from_metadata(read_header(source).metadata, str(source)) or Contract(base_name=source.stem)
    if request.base is None:
        if request.chat_template:
            template = _checked_template(request.chat_template)
            found = found.with_changes(chat_template=template, golden_messages=(), golden_tokens=(), certificate="")
        return found
    return _against(found, source, request.base, store, chat_template=request.chat_template, force=request.force)


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

    folders = [adapter.path for adapter in adapters if adapter.path.is_dir()]
    base = request.base or (find_base(folders[0], None, store) if folders else None)
    contracts = [contract_of(adapter.path) for adapter in adapters]
    contract = _common_contract([each for each in contracts if each], base, store, request)
    parts = [Part(adapter.path, adapter.scale) for adapter in adapters]
    with prepare_blend(parts, base, request.settings.options(), way=way) as prepared:
        shares = {adapter.name: adapter.scale for adapter in adapters}
        exactness = {
            **_exactness(prepared, [each.exactness for each in contracts if each]),
            "blend": shares,
            "way": way,
        }
        contract = contract.with_changes(exactness=exactness, base_fingerprint=prepared.base_fingerprint)
        report = prepared.write(target, contract.to_metadata(), progress=progress, force=request.force)
    return _registered(report, store)


def _exactness(prepared: PreparedAdapter, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a contract says of a conversion; what GGUF adapters had lost before stays said.

    Args:
        before: of those that were read.
    """
    now = prepared.exactness()
    residual: dict[str, float] = dict(now.get("residual_energy", {}))
    for each in before:
        for tensor, share in each.get("residual_energy", {}).items():
            residual[tensor] = max(share, residual.get(tensor, 0.0))
    now["rounding"] = max([now["rounding"], *(each.get("rounding", 0.0) for each in before)])
    if any(each.get("kind") == "approximate" for each in before):
        now |= {
            "kind": "approximate",
            "residual_energy": residual,
            "max_error": sqrt(max(residual.values(), default=0.0)),
        }
    if len(before) == 1 and "method" in before[0]:
        now["method"] = before[0]["method"]
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
    contracts: Sequence[Contract], base: Path | None, store: Store, request: AdapterRequest
) -> Contract:
    """What all of the blended adapters agree on; nothing of one alone holds for their sum."""
    first = contracts[0] if contracts else Contract()
    changes: dict[str, Any] = {"training": {}, "exactness": {}, "certificate": ""}
    for name in ("system", "stop", "sampling", "chat_template"):
        if any(getattr(other, name) != getattr(first, name) for other in contracts):
            changes[name] = getattr(Contract(), name)
    if "chat_template" in changes:
        changes |= {"golden_messages": (), "golden_tokens": ()}
    common = first.with_changes(**changes)
    if base is None:
        return common
    return _against(common, base, base, store, chat_template=request.chat_template, force=request.force)


def merged_adapters(
    adapters: Sequence[AdapterRef], base: Path, settings: AdapterSettings, store: Store, *, force: bool
) -> tuple[tuple[Merged, ...], str]:
    """Adapters to be merged into a base that they were made for, and the chat template that the last of them brings.

    Raises:
        BaseMismatchError: one was made for another base.
    """
    from converters.merge import Merged
    from edgelora.resolution import contract_of

    template = ""
    for adapter in adapters:
        contract = contract_of(adapter.path)
        if contract is not None:
            _check_base(contract, adapter.path, base, store.fingerprint(base), force=force)
            template = contract.chat_template or template
    merged = [
        Merged(adapter.path, adapter.scale, allow_bin=settings.allow_bin, initial=settings.initial)
        for adapter in adapters
    ]
    return tuple(merged), template


def adapter_from_folder(folder: Path, base: Path, store: Store, *, force: bool = False) -> Path:
    """The GGUF of a PEFT folder, made once for each content and kept in the store.

    With `force`, a folder that was trained on another base is converted all the same.

    Raises:
        ConversionError, ModelFileError: the folder cannot be converted, or the store cannot be written.
    """
    from converters.adapter import prepare_adapter

    target = store.adapter_path(_content_hash(folder, store.fingerprint(base)))
    if not target.is_file():
        contract = contract_for(folder, base, store, force=force)
        store.make_adapter_folder()
        with prepare_adapter(folder, base, fingerprint=store.fingerprint(base)) as prepared:
            contract = contract.with_changes(exactness=prepared.exactness())
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


def find_base(folder: Path, given: Path | None, store: Store) -> Path:
    """The base a PEFT folder is converted against: the one given, the one it names (a folder, or a hub id that lies in
    the Hugging Face cache), or the store's.

    Raises:
        BaseNotFoundError: none of them.
    """
    if given:
        return given
    named = _named_folder(folder)
    if named and _is_base_of(named, folder, store):
        return named
    try:
        return store.find_base(Contract.load(folder), folder).path
    except BaseNotFoundError as error:
        wanted = _base_named_by(folder)
        trained = f" It was trained on {wanted}." if wanted else ""
        raise BaseNotFoundError(
            error.message, hint=f"Name it with --base: its Hugging Face folder, or a GGUF of it.{trained}"
        ) from None


def _named_folder(folder: Path) -> Path | None:
    from converters.hub import is_hub_id
    from converters.hub_cache import cached_snapshot, missing_from
    from converters.peft_config import read_peft_config

    name = _base_named_by(folder)
    if not name:
        return None
    if (Path(name) / "config.json").is_file():
        return Path(name)
    revision = read_peft_config(folder).values.get("revision")
    found = cached_snapshot(name, revision if isinstance(revision, str) else "main") if is_hub_id(name) else None
    return found if found and not missing_from(found) else None


def _is_base_of(named: Path, folder: Path, store: Store) -> bool:
    """Whether the folder an adapter names is still what it was trained on; without a contract, it is believed."""
    contract = Contract.load(folder)
    return contract is None or not contract.base_fingerprint or store.fingerprint(named) == contract.base_fingerprint


def _base_named_by(folder: Path) -> str:
    from converters.peft_config import read_peft_config

    config = read_peft_config(folder)
    return config.base_model or str(config.values.get("model") or "")  # MLX's name for it


def contract_for(
    folder: Path, base: Path, store: Store, *, chat_template: str | None = None, force: bool = False
) -> Contract:
    """The contract of a PEFT folder: the one training wrote, or one made from what the base says of itself.

    Raises:
        BaseMismatchError: training wrote down another base than `base`.
    """
    found = Contract.load(folder) or Contract(base_name=_base_named_by(folder) or base.stem)
    return _against(found, folder, base, store, chat_template=chat_template, force=force)


def _against(
    contract: Contract, source: Path, base: Path, store: Store, *, chat_template: str | None, force: bool
) -> Contract:
    """A contract for one base.

    Raises:
        BaseMismatchError: it was made for another.
    """
    fingerprint = store.fingerprint(base)
    _check_base(contract, source, base, fingerprint, force=force)
    if chat_template or not contract.chat_template:
        template = _checked_template(chat_template) if chat_template else _template_of(base)
        contract = contract.with_changes(
            chat_template=template, golden_messages=(), golden_tokens=(), certificate=""
        )  # all of them were recorded under another template
        if template and not contract.stop and base.is_dir():
            contract = _with_golden(contract, base)
    return contract.with_changes(base_fingerprint=fingerprint)


def _check_base(contract: Contract, source: Path, base: Path, fingerprint: str, *, force: bool) -> None:
    if contract.base_fingerprint in ("", fingerprint) or force:
        return
    raise BaseMismatchError(
        f"{source} was trained on {contract.base_name or 'another base'} (fingerprint "
        f"{contract.base_fingerprint[:12]}); {base} is another (fingerprint {fingerprint[:12]})",
        hint="Name the right base with --base, or use --force to convert it all the same.",
    )


def _checked_template(name_or_path: str) -> str:
    return ChatTemplate(resolve(name_or_path)).source


def _template_of(base: Path) -> str:
    """The base's own chat template, empty where it has none."""
    if base.is_dir():
        from converters.special_tokens import chat_template_of

        return chat_template_of(base)
    from converters.base_file import read_base_header

    return str(read_base_header(base).metadata.get("tokenizer.chat_template", ""))


def _with_golden(contract: Contract, base: Path) -> Contract:
    """Record the ids of a short conversation, by the Hugging Face tokenizer, for the device to compare with."""
    tokens = golden_tokens(base, contract.chat_template, GOLDEN_MESSAGES)
    return contract.with_changes(golden_messages=GOLDEN_MESSAGES, golden_tokens=tokens) if tokens else contract


def golden_tokens(base: Path, template: str, messages: tuple[Message, ...]) -> tuple[int, ...]:
    """The ids of `messages` under `template`, by the tokenizer in an HF folder; empty without a `tokenizer.json`."""
    import json

    from tokenizers import Tokenizer

    path = base / "tokenizer.json"
    if not path.is_file():
        return ()
    names: dict[str, Any] = {}
    if (base / "tokenizer_config.json").is_file():
        names = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = ChatTemplate(template).render(
        messages,
        add_generation_prompt=True,
        bos_token=_token_text(names.get("bos_token")),
        eos_token=_token_text(names.get("eos_token")),
    )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def _token_text(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
