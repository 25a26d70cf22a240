"""`edgelora convert` of a base: from a Hugging Face folder or a GGUF file, with everything that can be asked for.

The bytes are the work of `converters`. This module adds what needs llama.cpp to run: importance measured on a text, and
a look at the perplexity before and after.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.base_settings import BaseSettings
from edgelora.calibration_text import read_calibration
from edgelora.contract import Value
from edgelora.errors import ModelFileError
from edgelora.store import Store
from edgelora.template import ChatTemplate, resolve

if TYPE_CHECKING:
    from converters.base import BaseReport
    from converters.imatrix import ImportanceMatrix
    from converters.options import QuantizeOptions
    from edgelora.engine.perplexity import PerplexityChange

BytesProgress = Callable[[int, int, str], None]
WindowsProgress = Callable[[int, int], None]
LOSSLESS = {"BF16": "bf16", "F16": "f16"}  # what a checkpoint's own values fit into; others need f32


@dataclass(frozen=True)
class BaseProgress:
    """Who is told: of bytes written, and of windows of text that were read. Either may be None."""

    written: BytesProgress | None = None
    measured: WindowsProgress | None = None


def convert_base_source(
    source: Path,
    target: Path,
    settings: BaseSettings,
    store: Store,
    *,
    threads: int | None = None,
    chat_template: str | None = None,
    force: bool = False,
    progress: BaseProgress | None = None,
) -> BaseReport:
    """Make a GGUF file of a model folder or of another GGUF file, and remember it.

    Raises:
        ConversionError, EdgeloraError: what is wrong; nothing is left behind.
    """
    settings.check()
    progress = progress or BaseProgress()
    metadata: dict[str, Value] = {}
    if chat_template:
        metadata["tokenizer.chat_template"] = ChatTemplate(resolve(chat_template)).source
    options = _options(settings, threads)
    if not settings.dry_run and settings.calibrate:
        _run(source, target, replace(options, quant="f32", imatrix=None), dry_run=True, force=force)  # refuse early
        options = replace(options, imatrix=_measured(source, target, settings, threads, progress))
    report = _run(
        source, target, options, metadata=metadata, progress=progress.written, force=force, dry_run=settings.dry_run
    )
    return report if settings.dry_run else _registered(report, store)


def check_perplexity(
    source: Path, made: Path, text: Path, *, chunks: int | None, threads: int | None, progress: BaseProgress
) -> PerplexityChange:
    """The perplexity of a base before and after its conversion.

    Args:
        source: what was converted: a model folder is written once more in its own precision, and that file deleted.
        made: the converted file.

    Raises:
        DataFileError: the text is too short or cannot be read.
        ModelFileError: a file that llama.cpp cannot run.
    """
    from edgelora.engine.perplexity import compare_perplexity

    with in_own_precision(source, made, threads, progress.written) as before:
        return compare_perplexity(
            before, made, read_calibration(text), chunks=chunks, threads=threads, progress=progress.measured
        )


@contextmanager
def in_own_precision(source: Path, near: Path, threads: int | None, progress: BytesProgress | None) -> Iterator[Path]:
    """A GGUF file that holds what `source` holds: itself, or for a folder a file beside `near` while it is needed."""
    if not source.is_dir():
        yield source
        return
    from converters.base import convert_base
    from converters.checkpoint import Checkpoint

    with Checkpoint(source) as checkpoint:
        dtypes = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    quant = LOSSLESS.get(next(iter(dtypes)), "f32") if len(dtypes) == 1 else "f32"
    path = near.with_name(f".{near.stem}.{secrets.token_hex(4)}.{quant}.gguf")
    try:
        yield convert_base(source, path, quant=quant, threads=threads, progress=progress).path
    finally:
        path.unlink(missing_ok=True)


def _options(settings: BaseSettings, threads: int | None) -> QuantizeOptions:
    from converters.imatrix import read_imatrix
    from converters.options import QuantizeOptions
    from converters.split import parse_size
    from converters.type_overrides import Overrides, parse_tensor_types

    overrides = Overrides(
        tensor_types=parse_tensor_types(settings.tensor_types),
        output=settings.output_type,
        token_embedding=settings.embedding_type,
        pure=settings.pure,
    )
    return QuantizeOptions(
        quant=settings.quant_name,
        overrides=None if overrides == Overrides() else overrides,
        imatrix=read_imatrix(settings.imatrix) if settings.imatrix else None,
        imatrix_file=str(settings.imatrix) if settings.imatrix else "",
        strict=settings.strict,
        untie=settings.untie,
        split_max_bytes=parse_size(settings.split_max_size) if settings.split_max_size else 0,
        split_max_tensors=settings.split_max_tensors,
        allow_requantize=settings.allow_requantize,
        threads=threads,
    )


def _run(
    source: Path,
    target: Path,
    options: QuantizeOptions,
    *,
    metadata: dict[str, Value] | None = None,
    progress: BytesProgress | None = None,
    force: bool,
    dry_run: bool,
) -> BaseReport:
    from converters.base import convert_base
    from converters.requantize import requantize

    if source.is_dir():
        return convert_base(
            source, target, options=options, metadata=metadata, progress=progress, force=force, dry_run=dry_run
        )
    return requantize(source, target, options, metadata=metadata, progress=progress, force=force, dry_run=dry_run)


def _measured(
    source: Path, target: Path, settings: BaseSettings, threads: int | None, progress: BaseProgress
) -> ImportanceMatrix:
    from converters.imatrix import write_imatrix
    from edgelora.engine.calibration import compute_imatrix

    assert settings.calibrate
    text = read_calibration(settings.calibrate)
    with in_own_precision(source, target, threads, progress.written) as base:
        matrix = compute_imatrix(
            base,
            text,
            chunks=settings.calibrate_chunks,
            adapter=settings.calibrate_adapter,
            threads=threads,
            progress=progress.measured,
        )
    if settings.save_imatrix:
        write_imatrix(settings.save_imatrix, matrix, force=True)
    return matrix


def _registered(report: BaseReport, store: Store) -> BaseReport:
    """Tell the store; the file is written and good, whatever the store says."""
    try:
        store.register(report.path)
    except ModelFileError as error:
        return replace(report, notices=(*report.notices, f"not remembered for later: {error.message}"))
    return report
