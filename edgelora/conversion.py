"""`edgelora convert` as a function: what SOURCE is, and where OUT goes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapter_conversion import AdapterRequest, blend, convert_adapter_source, merged_adapters
from edgelora.adapter_ref import AdapterRef
from edgelora.adapter_settings import AdapterSettings
from edgelora.base_conversion import BaseProgress, convert_base_source
from edgelora.base_settings import BaseSettings
from edgelora.errors import ModelFileError, SettingsError
from edgelora.store import Store

if TYPE_CHECKING:
    from converters.adapter import AdapterReport
    from converters.base import BaseReport

MERGE_TOO = ("--allow-bin", "--initial")  # options of adapters that hold for those that are merged
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
        adapter: everything about the conversion of an adapter.
    """

    quant: str | None = None
    settings: BaseSettings = field(default_factory=BaseSettings)
    base: Path | None = None
    chat_template: str | None = None
    threads: int | None = None
    force: bool = False
    adapter: AdapterSettings = field(default_factory=AdapterSettings)

    @property
    def adapter_request(self) -> AdapterRequest:
        return AdapterRequest(self.adapter, self.base, self.chat_template, self.force, self.settings.imatrix)

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
    return _convert_adapter(source, out, options, store, progress)


def _convert_base(
    source: Path, out: Path | str | None, options: ConvertOptions, store: Store, progress: BaseProgress
) -> BaseReport:
    if options.base:
        raise SettingsError(f"--base goes with an adapter, and {source} is a base")
    settings = options.base_settings
    if given := [name for name in options.adapter.given() if not settings.merge or name not in MERGE_TOO]:
        raise SettingsError(f"{', '.join(given)}: for adapters that are converted, and {source} is a base")
    merge = merged_adapters(settings.merge, source, options.adapter, store, force=options.force)
    report = convert_base_source(
        source,
        _target(out, _base_name(source, settings)),
        settings,
        store,
        threads=options.threads,
        chat_template=options.chat_template,
        merged=merge.adapters,
        template=merge.template,
        force=options.force,
        progress=progress,
    )
    return replace(report, notices=(*merge.notices, *report.notices))


def _base_name(source: Path, settings: BaseSettings) -> str:
    """NAME-QUANT.gguf; with what was merged into it, and without the quantization where it stays what it was."""
    names = [source_name(source), *(adapter.name for adapter in settings.merge)]
    if settings.keeps_types and not source.is_dir():
        untied = ["untied"] if settings.untie and not settings.merge else []
        return "-".join(filter(None, [*names, *untied, source.stem.removeprefix(names[0]).lstrip("-.")])) + ".gguf"
    return "-".join([*names, settings.quant_name]) + ".gguf"


def _convert_adapter(
    source: Path, out: Path | str | None, options: ConvertOptions, store: Store, progress: Progress | None
) -> AdapterReport:
    usual = {"--imatrix"} if options.adapter.repair_rank else set()
    if given := [name for name in _given(options.base_settings) if name not in usual]:
        verb = "goes" if len(given) == 1 else "go"
        raise SettingsError(f"{', '.join(given)} {verb} with a base, and {source} is an adapter")
    if options.threads:
        raise SettingsError(f"--threads: for quantizing a base, and {source} is an adapter")
    kind = f"-{options.adapter.dtype or 'f16'}" if source.is_file() else ""
    target = _target(out, f"{source_name(source)}{kind}.gguf")
    return convert_adapter_source(source, target, options.adapter_request, store, progress=progress)


def blend_adapters(
    adapters: Sequence[AdapterRef],
    out: Path | str | None,
    options: ConvertOptions,
    *,
    way: str = "cat",
    store: Store | None = None,
    progress: Progress | None = None,
) -> AdapterReport:
    """One GGUF adapter of several, each at its scale; see `converters.blend`.

    Raises:
        SettingsError: options that go with a base.
        ConversionError, EdgeloraError: adapters that cannot be blended.
    """
    if given := _given(options.base_settings):
        raise SettingsError(f"--blend makes an adapter: {', '.join(given)} cannot go with it")
    others = [name for name in options.adapter.given() if name.startswith(("--initial", "--certify", "--repair"))]
    if others or options.threads:
        raise SettingsError(f"{', '.join([*others, *(['--threads'] if options.threads else [])])}: not with --blend")
    target = _target(out, "-".join(adapter.name for adapter in adapters) + ".gguf")
    return blend(adapters, target, options.adapter_request, store or Store(), way=way, progress=progress)


# Options of the command line, by the settings that they fill, where the two are not named alike.
_OPTION_NAMES = {"tensor_types": "tensor-type", "output_type": "output-tensor-type",
                 "embedding_type": "token-embedding-type"}  # fmt: skip


def _given(settings: BaseSettings) -> list[str]:
    """The options that were used, of those about bases."""
    usual = BaseSettings()
    used = [field.name for field in fields(settings) if getattr(settings, field.name) != getattr(usual, field.name)]
    return [f"--{_OPTION_NAMES.get(name, name.replace('_', '-'))}" for name in used]


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
