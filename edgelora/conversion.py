"""`edgelora convert` as a function: what SOURCE is, where OUT goes, the contract inside, and the store told.

The bytes are the work of `converters`; this module adds what only edgelora knows, the contract.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import ConversionError
from edgelora.base_conversion import BaseProgress, convert_base_source
from edgelora.base_settings import BaseSettings
from edgelora.contract import FILE_NAME, GOLDEN_MESSAGES, Contract
from edgelora.errors import BaseMismatchError, BaseNotFoundError, ModelFileError, SettingsError
from edgelora.messages import Message
from edgelora.store import Store
from edgelora.template import ChatTemplate, resolve
from edgelora.version import __version__

if TYPE_CHECKING:
    from converters.adapter import AdapterReport
    from converters.base import BaseReport

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ConvertOptions:
    """What `edgelora convert` can be told.

    Attributes:
        quant: quantization of a base, for short; it wins over that of `settings`.
        settings: everything about the conversion of a base.
        base: the base of an adapter: an HF folder or a GGUF; None lets the store find it.
        chat_template: a built-in name or a Jinja file, instead of the source's own.
        threads: cores to quantize on; None is all that the process may use.
        force: replace OUT where it exists, and convert an adapter against a base it was not made for.
    """

    quant: str | None = None
    settings: BaseSettings = field(default_factory=BaseSettings)
    base: Path | None = None
    chat_template: str | None = None
    threads: int | None = None
    force: bool = False

    @property
    def base_settings(self) -> BaseSettings:
        return replace(self.settings, quant=self.quant) if self.quant else self.settings


def convert(
    source: Path,
    out: Path | str | None = None,
    options: ConvertOptions | None = None,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
    measured: Callable[[int, int], None] | None = None,
    prepared: Progress | None = None,
) -> BaseReport | AdapterReport:
    """Convert a base (a Hugging Face folder, or a GGUF file) or a PEFT adapter to GGUF, whichever `source` is.

    Args:
        out: a file, or a folder to put it in (text that ends in `/` is a folder); None is the current folder. The
            default name of a base is `NAME-QUANT.gguf`, that of an adapter `NAME.gguf`.
        progress: called with bytes written, bytes in all, and the tensor; `measured` with windows of text read, and
            `prepared` as `progress`, of the temporary file that is measured on.

    Raises:
        ConversionError, EdgeloraError: `source` is neither, is damaged, or cannot be converted exactly.
    """
    from converters.detect import SourceKind, detect

    options, store = options or ConvertOptions(), store or Store()
    kind = detect(source)
    if kind in (SourceKind.HF_BASE, SourceKind.GGUF_BASE):
        return _convert_base(source, out, options, store, BaseProgress(progress, measured, prepared))
    if kind is SourceKind.PEFT_ADAPTER:
        return _convert_adapter(source, out, options, store, progress)
    raise ConversionError(
        f"{source} is a GGUF adapter already",
        hint="Give a base (a Hugging Face folder or a GGUF file), or the folder that PEFT wrote for an adapter.",
    )


def _convert_base(
    source: Path, out: Path | str | None, options: ConvertOptions, store: Store, progress: BaseProgress
) -> BaseReport:
    if options.base:
        raise SettingsError(f"--base goes with an adapter, and {source} is a base")
    settings = options.base_settings
    return convert_base_source(
        source,
        _target(out, f"{source_name(source)}-{settings.quant_name}.gguf"),
        settings,
        store,
        threads=options.threads,
        chat_template=options.chat_template,
        force=options.force,
        progress=progress,
    )


def _convert_adapter(
    source: Path, out: Path | str | None, options: ConvertOptions, store: Store, progress: Progress | None
) -> AdapterReport:
    from converters.adapter import prepare_adapter

    if given := _given(options.base_settings):
        verb = "goes" if len(given) == 1 else "go"
        raise SettingsError(f"{', '.join(given)} {verb} with a base, and {source} is an adapter")
    base = find_base(source, options.base, store)
    contract = contract_for(source, base, store, chat_template=options.chat_template, force=options.force)
    target = _target(out, f"{source_name(source)}.gguf")
    with prepare_adapter(source, base) as prepared:
        contract = contract.with_changes(exactness=prepared.exactness())
        return prepared.write(target, contract.to_metadata(), progress=progress, force=options.force)


# Options of the command line, by the settings that they fill, where the two are not named alike.
_OPTION_NAMES = {"tensor_types": "tensor-type", "output_type": "output-tensor-type",
                 "embedding_type": "token-embedding-type"}  # fmt: skip


def _given(settings: BaseSettings) -> list[str]:
    """The options that were used, of those about bases."""
    usual = BaseSettings()
    used = [field.name for field in fields(settings) if getattr(settings, field.name) != getattr(usual, field.name)]
    return [f"--{_OPTION_NAMES.get(name, name.replace('_', '-'))}" for name in used]


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
        with prepare_adapter(folder, base) as prepared:
            contract = contract.with_changes(exactness=prepared.exactness())
            prepared.write(target, contract.to_metadata(), force=True)
    return target


def _content_hash(folder: Path, base_fingerprint: str) -> str:
    digest = hashlib.sha256(f"{__version__}\0{base_fingerprint}".encode())  # another version may convert otherwise
    for name in ("adapter_config.json", "adapter_model.safetensors", FILE_NAME):
        path = folder / name
        digest.update(f"\0{name}\0".encode())
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def find_base(folder: Path, given: Path | None, store: Store) -> Path:
    """The base a PEFT folder is converted against: the one given, the folder it names, or the store's."""
    if given:
        return given
    named = _base_named_by(folder)
    if named and (Path(named) / "config.json").is_file() and _is_base_of(Path(named), folder, store):
        return Path(named)
    try:
        return store.find_base(Contract.load(folder), folder).path
    except BaseNotFoundError as error:
        raise BaseNotFoundError(
            error.message, hint="Name it with --base: its Hugging Face folder, or a GGUF of it."
        ) from None


def _is_base_of(named: Path, folder: Path, store: Store) -> bool:
    """Whether the folder an adapter names is still what it was trained on; without a contract, it is believed."""
    contract = Contract.load(folder)
    return contract is None or not contract.base_fingerprint or store.fingerprint(named) == contract.base_fingerprint


def _base_named_by(folder: Path) -> str:
    from converters.peft_config import read_peft_config

    return str(read_peft_config(folder).base_model)


def contract_for(
    folder: Path, base: Path, store: Store, *, chat_template: str | None = None, force: bool = False
) -> Contract:
    """The contract of a PEFT folder: the one training wrote, or one made from what the base says of itself.

    Raises:
        BaseMismatchError: training wrote down another base than `base`.
    """
    found, fingerprint = Contract.load(folder), store.fingerprint(base)
    if found is None:
        found = Contract(base_name=_base_named_by(folder) or base.stem)
    elif found.base_fingerprint and found.base_fingerprint != fingerprint and not force:
        raise BaseMismatchError(
            f"{folder} was trained on {found.base_name or 'another base'} (fingerprint {found.base_fingerprint[:12]}); "
            f"{base} is another (fingerprint {fingerprint[:12]})",
            hint="Name the right base with --base, or use --force to convert it all the same.",
        )
    if chat_template or not found.chat_template:
        source = _checked_template(chat_template) if chat_template else _template_of(base)
        found = found.with_changes(chat_template=source, golden_messages=(), golden_tokens=())
        if source and not found.stop and base.is_dir():
            found = _with_golden(found, base)
    return found.with_changes(base_fingerprint=fingerprint)


def _checked_template(name_or_path: str) -> str:
    return ChatTemplate(resolve(name_or_path)).source


def _template_of(base: Path) -> str:
    """The base's own chat template, empty where it has none."""
    if base.is_dir():
        from converters.checkpoint import Checkpoint
        from converters.model import understand

        with Checkpoint(base) as checkpoint:
            return str(understand(checkpoint).vocabulary.metadata.get("tokenizer.chat_template", ""))
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


def source_name(source: Path) -> str:
    """What people call a folder: its name, or the model's where it is a snapshot in the Hugging Face cache; of a GGUF
    file, what is before its quantization and the number of its part."""
    from converters.hub_cache import repository_of
    from converters.quant_types import RECIPES

    source = source.resolve()
    if source.is_dir():
        return repository_of(source).rpartition("/")[2] or source.name
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", source.stem)
    before, separator, last = stem.rpartition("-" if "-" in stem else ".")
    return before if separator and last.lower() in RECIPES else stem


def _target(out: Path | str | None, name: str) -> Path:
    if str(out) == "-":
        raise SettingsError("a GGUF file cannot go to standard output", hint="Name a file with -o.")
    if out is None:
        return Path(name)
    if os.path.isdir(out):  # unlike Path.is_dir, also false of a name that is too long
        return Path(out) / name
    if str(out).endswith("/"):
        raise ModelFileError(f"{out}: no such folder", hint=f"Make it first: mkdir -p {out}")
    return Path(out)
