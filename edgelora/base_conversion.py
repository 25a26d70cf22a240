"""`edgelora convert` of a base: from a Hugging Face folder or a GGUF file, with everything that can be asked for.

The bytes are the work of `converters`. This module adds what needs llama.cpp to run: importance measured on a text, and
a look at the perplexity before and after. Whatever can be refused is refused before the long part begins.
"""

from __future__ import annotations

import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.base_settings import BaseSettings
from edgelora.calibration_text import CalibrationText, read_calibration
from edgelora.contract import Value
from edgelora.errors import BaseMismatchError, ModelFileError, SettingsError
from edgelora.store import Store
from edgelora.template import ChatTemplate, resolve

if TYPE_CHECKING:
    from converters.base import BaseReport
    from converters.imatrix import ImportanceMatrix
    from converters.merge import Merged
    from converters.options import QuantizeOptions
    from converters.plan import Plan
    from edgelora.engine.perplexity import PerplexityChange

BytesProgress = Callable[[int, int, str], None]
WindowsProgress = Callable[[int, int], None]
LOSSLESS = {"BF16": "bf16", "F16": "f16"}  # what a checkpoint's own values fit into; others need f32


@dataclass(frozen=True)
class BaseProgress:
    """Who is told: of bytes written, of bytes of the temporary file that is measured on, and of windows of text that
    were read. Any may be None."""

    written: BytesProgress | None = None
    measured: WindowsProgress | None = None
    prepared: BytesProgress | None = None


@dataclass(frozen=True)
class Inputs:
    """Files that were given beside the source, read."""

    imatrix: ImportanceMatrix | None
    calibrate: CalibrationText | None
    check: CalibrationText | None

    @property
    def texts(self) -> list[CalibrationText]:
        return [text for text in (self.calibrate, self.check) if text]


def read_inputs(settings: BaseSettings) -> Inputs:
    """Read them, before the source is downloaded or anything is written.

    Raises:
        SettingsError: see `BaseSettings.verify`.
        ConversionError, DataFileError: an importance matrix or a text that cannot be used.
    """
    from converters.imatrix import read_imatrix

    settings.verify()
    return Inputs(
        read_imatrix(settings.imatrix) if settings.imatrix else None,
        read_calibration(settings.calibrate) if settings.calibrate else None,
        read_calibration(settings.check) if settings.check else None,
    )


@dataclass(frozen=True)
class _Conversion:
    """One conversion with everything looked up."""

    source: Path
    target: Path
    settings: BaseSettings
    inputs: Inputs
    store: Store
    metadata: dict[str, Value]
    template: ChatTemplate | None
    threads: int | None
    force: bool
    progress: BaseProgress
    merged: tuple[Merged, ...] = ()

    def options(self, imatrix: ImportanceMatrix | None) -> QuantizeOptions:
        from converters.options import QuantizeOptions

        settings = self.settings
        return QuantizeOptions(
            quant=settings.quant_name,
            overrides=settings.overrides(),
            imatrix=imatrix,
            imatrix_file=str(settings.imatrix or ""),
            strict=settings.strict,
            untie=settings.untie,
            split_max_bytes=settings.split_max_bytes(),
            split_max_tensors=settings.split_max_tensors,
            allow_requantize=settings.allow_requantize,
            threads=self.threads,
        )

    def write(self, options: QuantizeOptions) -> BaseReport:
        return self._run(options, progress=self.progress.written, force=self.force, dry_run=False)

    def plan(self) -> BaseReport:
        """What `write` will do; where importance is still to be measured, as if it had been."""
        imatrix = self.inputs.imatrix
        if self.inputs.calibrate:
            shapes = self._run(replace(self.options(None), quant="f32", overrides=None), force=True, dry_run=True)
            imatrix = _stand_in(_plan_of(shapes), self.inputs.calibrate)
        return self._run(self.options(imatrix), force=self.force or self.settings.dry_run, dry_run=True)

    def _run(
        self, options: QuantizeOptions, *, progress: BytesProgress | None = None, force: bool, dry_run: bool
    ) -> BaseReport:
        from converters.base import convert_base
        from converters.merge import merge
        from converters.requantize import requantize

        how: dict[str, Any] = {"metadata": self.metadata, "progress": progress, "force": force, "dry_run": dry_run}
        if self.merged:
            keeps = self.settings.keeps_types
            return merge(self.source, self.merged, self.target, options, keep_types=keeps, **how)
        if self.source.is_dir():
            return convert_base(self.source, self.target, options=options, **how)
        return requantize(self.source, self.target, options, keep_types=self.settings.keeps_types, **how)


def convert_base_source(
    source: Path,
    target: Path,
    settings: BaseSettings,
    store: Store,
    *,
    threads: int | None = None,
    chat_template: str | None = None,
    merged: tuple[Merged, ...] = (),
    template: str = "",
    force: bool = False,
    progress: BaseProgress | None = None,
) -> BaseReport:
    """Make a GGUF file of a model folder or of another GGUF file, and remember it.

    Args:
        merged: adapters to merge into it, which fit it; `template` is the chat template that they bring.

    Raises:
        ConversionError, EdgeloraError: what is wrong; nothing is left behind.
    """
    inputs = read_inputs(settings)
    chosen = ChatTemplate(resolve(chat_template)) if chat_template else ChatTemplate(template) if template else None
    metadata: dict[str, Value] = {"tokenizer.chat_template": chosen.source} if chosen else {}
    conversion = _Conversion(
        source, target, settings, inputs, store, metadata, chosen, threads, force, progress or BaseProgress(), merged
    )
    adapter = None
    if settings.dry_run or inputs.texts:
        planned = conversion.plan()
        adapter = _calibration_adapter(conversion)
        _check_texts(conversion, adapter)
        if settings.dry_run:
            return _with_existing(planned, force=force)
        _check_room(conversion, _plan_of(planned))
        _check_save(conversion)
    imatrix = _measured(conversion, adapter) if inputs.calibrate else inputs.imatrix
    return _registered(conversion.write(conversion.options(imatrix)), store)


def check_perplexity(
    source: Path,
    made: Path,
    text: Path,
    *,
    chunks: int | None = None,
    threads: int | None = None,
    chat_template: str | None = None,
    progress: BaseProgress | None = None,
) -> PerplexityChange:
    """The perplexity of a base before and after its conversion.

    Args:
        source: what was converted: a model folder is written once more in its own precision, and that file deleted.
        made: the converted file.
        chat_template: for conversations, instead of the base's own: a built-in name or a Jinja file.

    Raises:
        DataFileError: the text is too short or cannot be read.
        ModelFileError: a file that llama.cpp cannot run.
    """
    from edgelora.engine.perplexity import compare_perplexity

    read, progress = read_calibration(text), progress or BaseProgress()
    template = ChatTemplate(resolve(chat_template)) if chat_template else None
    with in_own_precision(source, made, threads, progress.prepared) as before:
        return compare_perplexity(
            before, made, read, chunks=chunks, threads=threads, chat_template=template, progress=progress.measured
        )


@contextmanager
def in_own_precision(source: Path, near: Path, threads: int | None, progress: BytesProgress | None) -> Iterator[Path]:
    """A GGUF file that holds what `source` holds: itself, or for a folder a file beside `near` while it is needed."""
    if not source.is_dir():
        yield source
        return
    from converters.base import convert_base

    path = near.with_name(f"{near.name}.{secrets.token_hex(4)}.partial")  # no .gguf: nobody takes it for a base
    try:
        yield convert_base(source, path, quant=own_quant(source), threads=threads, progress=progress).path
    finally:
        path.unlink(missing_ok=True)


def own_quant(folder: Path) -> str:
    """The smallest type without quantization that holds all of a checkpoint's values."""
    from converters.checkpoint import Checkpoint

    with Checkpoint(folder) as checkpoint:
        dtypes = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    return LOSSLESS.get(next(iter(dtypes)), "f32") if len(dtypes) == 1 else "f32"


def _plan_of(report: BaseReport) -> Plan:
    assert report.plan is not None
    return report.plan


def _stand_in(plan: Plan, text: CalibrationText) -> ImportanceMatrix:
    """A matrix with entries for what `compute_imatrix` measures, so that a conversion can be planned before that."""
    import numpy as np

    from converters.imatrix import Importance, ImportanceMatrix

    entries = {}
    for tensor in plan.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            n_expert = tensor.shape[0] if len(tensor.shape) > 2 else 1
            ones = np.ones(n_expert * tensor.shape[-1], np.float32)
            entries[tensor.name] = Importance(ones, np.ones(n_expert, np.int64))
    return ImportanceMatrix(entries, (text.name,), 1, 512)


def _with_existing(report: BaseReport, *, force: bool) -> BaseReport:
    there = [str(path) for path in report.files if path.exists()]
    if force or not there:
        return report
    notice = f"{', '.join(there[:3])}: there already, and replaced only with --force"
    return replace(report, notices=(*report.notices, notice))


def _check_texts(conversion: _Conversion, adapter: Path | None) -> None:
    """Raises:
    DataFileError: a text is too short, or the chat template it is measured with refuses a conversation.
    """
    from edgelora.engine.windows import check_text
    from edgelora.resolution import contract_of

    inputs, settings, template = conversion.inputs, conversion.settings, conversion.template
    contract = contract_of(adapter) if adapter and not template else None
    of_adapter = ChatTemplate(contract.chat_template) if contract and contract.chat_template else template
    with _vocabulary(conversion) as path:
        if inputs.calibrate:
            check_text(path, inputs.calibrate, conversion.source, settings.calibrate_chunks, of_adapter)
        if inputs.check:
            check_text(path, inputs.check, conversion.source, settings.check_chunks, template)


@contextmanager
def _vocabulary(conversion: _Conversion) -> Iterator[Path]:
    """A GGUF file with the vocabulary of the source: itself, or for a folder a file without weights."""
    if not conversion.source.is_dir():
        yield conversion.source
        return
    import tempfile

    from converters.base import plan_base
    from converters.checkpoint import Checkpoint
    from converters.options import QuantizeOptions
    from converters.writer import create, header_bytes

    with tempfile.TemporaryDirectory(prefix="edgelora-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        with Checkpoint(conversion.source) as checkpoint:
            job = plan_base(checkpoint, QuantizeOptions("f32"), conversion.metadata)
        with create(path, header_bytes(job.metadata, ())):
            pass
        yield path


def _check_room(conversion: _Conversion, plan: Plan) -> None:
    """Room for what is written, and for the temporary file that a folder's model is measured with.

    Raises:
        DiskFullError: there is too little.
    """
    from converters.base import convert_base
    from converters.errors import DiskFullError

    source, inputs = conversion.source, conversion.inputs
    if not source.is_dir():
        return
    own = convert_base(source, plan.files[0].path, quant=own_quant(source), force=True, dry_run=True).size_bytes
    needed = max(own, plan.size_bytes) + (min(own, plan.size_bytes) if inputs.check else 0)
    free = shutil.disk_usage(conversion.target.resolve().parent).free
    if needed > free:
        options = " and ".join(f"--{name}" for name in ("calibrate", "check") if getattr(inputs, name))
        raise DiskFullError(
            f"{conversion.target}: needs {needed:,} bytes, {free:,} are free there: {plan.size_bytes:,} for itself and "
            f"{own:,} for the model in its own precision, which {options} runs for a while",
            hint="Free some space, choose another disk, or measure on a machine that has it (--save-imatrix).",
        )


def _measured(conversion: _Conversion, adapter: Path | None) -> ImportanceMatrix:
    from converters.imatrix import write_imatrix
    from edgelora.engine.calibration import compute_imatrix

    settings, threads, text = conversion.settings, conversion.threads, conversion.inputs.calibrate
    assert text is not None
    with in_own_precision(conversion.source, conversion.target, threads, conversion.progress.prepared) as base:
        matrix = compute_imatrix(
            base,
            text,
            chunks=settings.calibrate_chunks,
            adapter=adapter,
            threads=threads,
            chat_template=conversion.template,
            progress=conversion.progress.measured,
        )
    if settings.save_imatrix:
        write_imatrix(settings.save_imatrix, matrix, force=conversion.force)
    return matrix


def _check_save(conversion: _Conversion) -> None:
    """Raises:
    SettingsError, OutputExistsError, WriteError: the measured matrix cannot go where it should.
    """
    from converters.writer import check_output

    path = conversion.settings.save_imatrix
    if path is None:
        return
    if path.resolve() == conversion.target.resolve():
        raise SettingsError(f"--save-imatrix and --out both name {path}")
    source, settings = conversion.source, conversion.settings
    inputs = [*(source.iterdir() if source.is_dir() else [source]), settings.calibrate, settings.calibrate_adapter]
    check_output(path, 0, force=conversion.force, inputs=[file for file in inputs if file])


def _calibration_adapter(conversion: _Conversion) -> Path | None:
    """The adapter as GGUF, known to be made for this base; None without one.

    Raises:
        ConversionError, ModelFileError: it is no adapter, or another base's.
    """
    from converters.detect import SourceKind, detect
    from edgelora.adapter_conversion import adapter_from_folder
    from edgelora.resolution import contract_of

    path, source, store = conversion.settings.calibrate_adapter, conversion.source, conversion.store
    if path is None:
        return None
    kind = detect(path)
    if kind is SourceKind.PEFT_ADAPTER:
        return adapter_from_folder(path, source, store)
    if kind is not SourceKind.GGUF_ADAPTER:
        raise ModelFileError(f"{path} is a base, and --calibrate-adapter takes an adapter")
    contract, found = contract_of(path), store.fingerprint(source)
    if contract and contract.base_fingerprint not in ("", found):
        raise BaseMismatchError(
            f"{path} was made for {contract.base_name or 'another base'} (fingerprint "
            f"{contract.base_fingerprint[:12]}); {source} is another (fingerprint {found[:12]})",
            hint="Measure with an adapter of this base, or without --calibrate-adapter.",
        )
    return path


def _registered(report: BaseReport, store: Store) -> BaseReport:
    """Tell the store; the file is written and good, whatever the store says."""
    from converters.errors import ConversionError

    try:
        store.register(report.path)
    except (ConversionError, ModelFileError) as error:
        return replace(report, notices=(*report.notices, f"not remembered for later: {error.message}"))
    return report
