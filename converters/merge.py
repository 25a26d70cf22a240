"""Adapters merged into their base: one GGUF file, in one pass, computed in float32.

A Hugging Face base goes the way of every conversion, and a GGUF base keeps the type of each tensor or gets another
quantization; in both, the rows that an adapter changes are changed as they stream by (`converters.edits`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from converters.adapted_base import AdaptedBase, open_base
from converters.adapter import against_base
from converters.adapter_source import open_adapter, unused_initial
from converters.adapter_targets import missing_targets
from converters.base import plan_base
from converters.base_file import BaseFile
from converters.block_types import TYPES
from converters.checkpoint import Floats
from converters.edits import Edits, edited_base, edits_of, joined, pair_edits
from converters.errors import UnsupportedAdapterError, listed
from converters.fingerprint import MERGED, is_norm, merged_fingerprint
from converters.gguf_adapter import open_gguf_adapter
from converters.imatrix import ImportanceMatrix
from converters.job import BaseReport, Job
from converters.methods.lora import INVOCATION
from converters.model_card import readable_name
from converters.options import QuantizeOptions
from converters.quant_types import tensor_order
from converters.requantize import plan_as_it_is, plan_requantize, recipe_of
from converters.resized import Resize, checkpoint_of, common_resize, find_resize, open_resized
from converters.stream import Progress, Source
from converters.tensor_kinds import EMBEDDING
from converters.writer import TensorSpec, Value

FINGERPRINT = "edgelora.fingerprint"
NOT_MERGED = "an activated LoRA leaves everything before its invocation to the base"
HASHED = (".safetensors", ".bin", ".json", ".gguf")


@dataclass(frozen=True)
class Merged:
    """An adapter to be merged.

    Attributes:
        path: what PEFT or MLX saved.
        scale: of the whole adapter.
        initial: see `AdapterOptions`.
    """

    path: Path
    scale: float = 1.0
    allow_bin: bool = False
    initial: Path | None = None

    @property
    def label(self) -> str:
        """Its name, scale and content, for the merged base's metadata."""
        digest = hashlib.sha256()
        for file in sorted([*_files(self.path), *(_files(self.initial) if self.initial else [])]):
            if file.is_file() and file.suffix in HASHED and not file.name.startswith("edgelora"):
                with open(file, "rb") as opened:
                    digest.update(os.fsencode(file.name) + b"\0" + hashlib.file_digest(opened, "sha256").digest())
        scale = str(float(self.scale)).removesuffix(".0")
        return f"{readable_name(self.path)}@{scale} sha256:{digest.hexdigest()}"


def merge(
    base: Path,
    adapters: Sequence[Merged],
    out: Path,
    options: QuantizeOptions | None = None,
    *,
    keep_types: bool = False,
    metadata: Mapping[str, Value] | None = None,
    progress: Progress | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> BaseReport:
    """Merge adapters into a base, one after another.

    Args:
        base: a Hugging Face folder, or a GGUF file (then dequantized, changed and quantized again).
        out: the GGUF file to write.
        options: of its quantization; None is `QuantizeOptions()` for a folder, and keeps the types of a GGUF base.
        keep_types: of a GGUF base, whatever quantization the options name.
        metadata: more keys for the file; they win.

    Raises:
        UnsupportedAdapterError: what cannot be merged; every reason in one message.
        ConversionError: another child of it that says what is wrong; nothing is left behind.
    """
    with ExitStack() as stack:
        known = stack.enter_context(open_base(base))
        resize = common_resize([found for adapter in adapters if (found := _resize(known, adapter))])
        known = stack.enter_context(open_resized(base, resize)) if resize else known
        edits = Edits()
        for adapter in adapters:
            edits = joined([edits, stack.enter_context(_edits(edited_base(known, edits), adapter))])
        labels = [*known.merged, *(adapter.label for adapter in adapters)]
        keys: dict[str, Value] = {MERGED: labels, **(metadata or {})}
        keeps = (keep_types or options is None) and not known.path.is_dir()
        quantize = options or QuantizeOptions()
        plan = _as_it_is if keeps else partial(_job, resize=resize)
        job = stack.enter_context(plan(known, edits, quantize, keys))
        inputs = (*job.inputs, *(file for adapter in adapters for file in _files(adapter.path)))
        job = replace(_edited(job, known, edits, labels), inputs=inputs)
        report = job.run(Path(out), quantize, progress=progress, force=force, dry_run=dry_run)
        return replace(report, quant=recipe_of(job.metadata)) if keeps else report


def _files(path: Path) -> list[Path]:
    return [*path.iterdir()] if path.is_dir() else [path]


def _resize(base: AdaptedBase, adapter: Merged) -> Resize | None:
    if not adapter.path.is_dir():
        return None
    with open_adapter(adapter.path, base, allow_bin=adapter.allow_bin, initial=adapter.initial) as source:
        return find_resize(adapter.path, source.reading, base)


@contextmanager
def _edits(base: AdaptedBase, adapter: Merged) -> Iterator[Edits]:
    if not adapter.path.is_dir():
        with open_gguf_adapter(adapter.path) as file:
            edits = pair_edits(file.pairs, base, adapter.scale)
            problems = [*edits.problems, *_other_architecture(file.header.architecture, base)]
            if adapter.initial is not None:
                raise unused_initial(adapter.path, "a GGUF adapter never did")
            problems += [NOT_MERGED] if file.header.metadata.get(INVOCATION) else []
            _check(adapter.path, base, problems, "")
            yield edits
        return
    with open_adapter(adapter.path, base, allow_bin=adapter.allow_bin, initial=adapter.initial) as read:
        source = against_base(read, base.released)
        edits = edits_of(source.reading, base, adapter.scale)
        _check(adapter.path, base, [*edits.problems, *missing_targets(source, base)], source.base_model)
        yield edits


def _other_architecture(architecture: str, base: AdaptedBase) -> list[str]:
    own = base.family.architecture
    return [] if architecture == own else [f"it is for {architecture}, and the base is {own}"]


def _check(path: Path, base: AdaptedBase, problems: Sequence[str], wanted: str) -> None:
    if problems:
        raise UnsupportedAdapterError(
            f"{path}: cannot be merged into {base.name}:{listed(problems)}",
            hint=f"Nothing was written. The adapter names {wanted or 'no base'}.",
        )


@contextmanager
def _job(
    base: AdaptedBase,
    edits: Edits,
    options: QuantizeOptions,
    metadata: Mapping[str, Value],
    *,
    resize: Resize | None,
) -> Iterator[Job]:
    """The base's own conversion."""
    asked = replace(options, untie=options.untie or edits.unties)
    if base.path.is_dir():
        with checkpoint_of(base.path, resize) as checkpoint:
            yield plan_base(checkpoint, asked, metadata)
    else:
        with BaseFile(base.path) as file:
            yield plan_requantize(file, replace(asked, allow_requantize=True), metadata)


@contextmanager
def _as_it_is(
    base: AdaptedBase, edits: Edits, options: QuantizeOptions, metadata: Mapping[str, Value]
) -> Iterator[Job]:
    with BaseFile(base.path) as file:
        job = plan_as_it_is(file, metadata, untie=options.untie or edits.unties)
        yield (
            job
            if options.imatrix is None
            else replace(job, sources=tuple(_weighed(source, options.imatrix) for source in job.sources))
        )


def _weighed(source: Source, imatrix: ImportanceMatrix) -> Source:
    shape = source.spec.shape
    experts = shape[-3] if len(shape) > 2 else 1
    return replace(source, importance=imatrix.means_for(source.spec.name, shape[-1], experts))


def _edited(job: Job, base: AdaptedBase, edits: Edits, labels: Sequence[str]) -> Job:
    """The same with the adapters in it."""
    sources = [_edited_source(source, base, edits) for source in job.sources]
    sources += [_new_source(name, shape, edits) for name, shape in edits.added.items()]
    fingerprint = merged_fingerprint(_with_norms(base, edits), labels)
    notices = list(job.notices)
    if base.is_lossy:
        notices.append("merged into weights that were quantized: the base as it was released loses less")
    if edits.added:
        sources.sort(key=lambda source: tensor_order(source.spec.name))
    return replace(
        job,
        sources=tuple(sources),
        stored={**job.stored, **dict.fromkeys(edits.added, "computed")},
        metadata={**job.metadata, FINGERPRINT: fingerprint} if FINGERPRINT in job.metadata else job.metadata,
        fingerprint=fingerprint,
        notices=tuple(notices),
    )


def _edited_source(source: Source, base: AdaptedBase, edits: Edits) -> Source:
    name = source.spec.name
    if name not in edits.by_tensor:
        return source
    read = source.read or partial(base.rows, name if name in base.shapes else EMBEDDING)

    def edited(start: int, stop: int) -> Floats:
        rows = read(start, stop)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            changed = edits.apply(name, rows, start)
        if not np.isfinite(changed).all() and np.isfinite(rows).all():
            raise UnsupportedAdapterError(
                f"{base.name}: {name} holds NaN or infinite values with the adapters merged into it",
                hint="Nothing was written. The adapter's values or its scale are broken.",
            )
        return changed

    return replace(source, read=edited, read_blocks=None)


def _new_source(name: str, shape: tuple[int, ...], edits: Edits) -> Source:
    def read(start: int, stop: int) -> Floats:
        return edits.apply(name, np.zeros((1, shape[0]), np.float32), 0)

    return Source(TensorSpec(name, shape, TYPES["F32"]), read)


def _with_norms(base: AdaptedBase, edits: Edits) -> str:
    """The fingerprint with the norms that the adapters leave."""
    if not any(is_norm(name) for name in edits.by_tensor):
        return base.plain_fingerprint
    return base.fingerprint_with((name, edits.apply(name, rows, 0).reshape(-1)) for name, rows in base.norms())
