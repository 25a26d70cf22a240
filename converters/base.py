"""A Hugging Face base to a GGUF file, in one pass: no intermediate file, and memory that does not grow with the model.

Every tensor's type and place is decided first (`plan_base`); then the weights stream through (`converters.stream`).
A 70B model needs the memory of a 1B one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from converters.architectures import Family
from converters.checkpoint import Checkpoint, Floats
from converters.errors import UnsupportedError
from converters.fingerprint import fingerprint_of
from converters.model import Model, norms, understand
from converters.model_card import describe
from converters.model_shape import ModelShape
from converters.quant_types import TYPES, find_recipe, plan_types
from converters.stream import CHUNK_BYTES, Progress, Source, write_tensors
from converters.view import View
from converters.writer import TensorSpec, Value, check_output, file_size, header_bytes

__all__ = ["BaseReport", "Plan", "Progress", "convert_base", "plan_base"]

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION, ggml/include/ggml.h
TRANSPOSED_CHUNK_BYTES = 16 << 20  # each chunk of a transposed matrix reads all of it
OUTPUT = "output.weight"
ReadRows = Callable[[int, int], Floats]


@dataclass(frozen=True)
class BaseReport:
    """What was written, or would be.

    Attributes:
        types: how many tensors have each type.
        notices: what the reader should know: differences at run time, values that are not finite.
    """

    path: Path
    size_bytes: int
    n_tensors: int
    types: Mapping[str, int]
    seconds: float
    name: str
    architecture: str
    quant: str
    fingerprint: str
    chat_template: str | None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first weight is read."""

    folder: Path
    sources: tuple[Source, ...]
    metadata: Mapping[str, Value]
    notices: tuple[str, ...]
    header: bytes = field(repr=False)

    @property
    def specs(self) -> list[TensorSpec]:
        return [source.spec for source in self.sources]

    @property
    def size_bytes(self) -> int:
        return file_size(self.header, self.specs)


def convert_base(
    folder: Path,
    out: Path,
    *,
    quant: str = "q4_k_m",
    threads: int | None = None,
    metadata: Mapping[str, Value] | None = None,
    progress: Progress | None = None,
    force: bool = False,
    strict: bool = False,
    untie: bool = False,
    dry_run: bool = False,
) -> BaseReport:
    """Convert a model folder.

    Args:
        folder: config.json, safetensors and tokenizer files, as transformers writes them.
        out: the GGUF file to write.
        quant: a name of `quant_types.RECIPES`.
        threads: for quantization; None takes every core.
        metadata: more keys for the file; they win over those found in the folder.
        progress: see `Progress`.
        force: overwrite `out`.
        strict: refuse weights that are NaN or infinite, which are otherwise written as they are, with a notice.
        untie: write the output as a tensor of its own where the model ties it to the embeddings.
        dry_run: plan and check everything, write nothing.

    Raises:
        ConversionError: a child of it that says what is wrong; nothing is left behind.
    """
    started = time.monotonic()
    with Checkpoint(Path(folder)) as checkpoint:
        plan = plan_base(checkpoint, quant, metadata or {}, untie=untie)
        check_output(Path(out), plan.size_bytes, force=force, inputs=_inputs(checkpoint))
        notices = list(plan.notices)
        if not dry_run:
            notices += write_tensors(Path(out), plan.header, plan.sources, threads, progress, strict=strict)
    template = plan.metadata.get("tokenizer.chat_template")
    return BaseReport(
        path=Path(out),
        size_bytes=plan.size_bytes,
        n_tensors=len(plan.sources),
        types=dict(Counter(spec.block_type.name for spec in plan.specs)),
        seconds=time.monotonic() - started,
        name=str(plan.metadata["general.name"]),
        architecture=str(plan.metadata["general.architecture"]),
        quant=quant.lower(),
        fingerprint=str(plan.metadata["edgelora.fingerprint"]),
        chat_template=template if isinstance(template, str) else None,
        notices=tuple(notices),
    )


def plan_base(checkpoint: Checkpoint, quant: str, metadata: Mapping[str, Value], *, untie: bool = False) -> Plan:
    """Decide every tensor's type and place, and the whole header.

    Raises:
        ConversionError: what cannot be converted, by name.
    """
    recipe, model = find_recipe(quant), understand(checkpoint)
    tensors = {**{name: _from_view(view) for name, view in model.views.items()}, **_untied(model, untie), **_computed(model)}
    shapes = {name: source.spec.shape for name, source in tensors.items()}
    stored = {name: source.spec.block_type for name, source in tensors.items() if source.read_blocks}
    named: dict[str, Value] = {"general.architecture": model.family.architecture, **model.metadata}
    types = plan_types(shapes, recipe, ModelShape.from_metadata(named)).types
    sources = tuple(
        _typed(tensors[name], TensorSpec(name, shapes[name], stored.get(name, kind))) for name, kind in types.items()
    )
    fingerprint = fingerprint_of(model.sizes, model.vocabulary.tokens, norms(model))
    pairs: dict[str, Value] = {
        **describe(checkpoint.folder, model.family.architecture, shapes),
        **model.metadata,
        "general.file_type": recipe.file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        **model.vocabulary.metadata,
        "edgelora.fingerprint": fingerprint,
        **metadata,
    }
    kept = [f"{len(stored)} tensors are MXFP4 in the checkpoint and stay so, whatever the quantization"] if stored else []
    header = header_bytes(pairs, [source.spec for source in sources])
    return Plan(checkpoint.folder, sources, pairs, (*model.notices, *kept), header)


def _typed(source: Source, spec: TensorSpec) -> Source:
    return Source(spec, source.read, source.read_blocks, source.importance, source.chunk_bytes)


def _from_view(view: View) -> Source:
    name = view.place.gguf_name
    if view.place.row.mxfp4:
        return Source(TensorSpec(name, view.shape, TYPES["MXFP4"]), read_blocks=view.read_blocks)
    chunk = TRANSPOSED_CHUNK_BYTES if view.is_transposed else CHUNK_BYTES
    return Source(TensorSpec(name, view.shape, TYPES["F32"]), view.read, chunk_bytes=chunk)


def _untied(model: Model, untie: bool) -> dict[str, Source]:
    """The embeddings once more as the output, where that is asked for.

    Raises:
        UnsupportedError: llama.cpp's graph of this family always takes the embeddings.
    """
    if not untie or OUTPUT in model.views:
        return {}
    if not _has_output(model.family):
        raise UnsupportedError(f"--untie: llama.cpp's {model.family.architecture} has no output tensor of its own")
    embedding = model.views["token_embd.weight"]
    return {OUTPUT: Source(TensorSpec(OUTPUT, embedding.shape, TYPES["F32"]), embedding.read)}


def _has_output(family: Family) -> bool:
    return any(row.gguf == "output" for row in family.rows)


def _computed(model: Model) -> dict[str, Source]:
    return {
        name: Source(TensorSpec(name, values.shape, TYPES["F32"]), _reader_of(values))
        for name, values in model.family.computed(model.config).items()
    }


def _reader_of(values: Floats) -> ReadRows:
    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]))
    return lambda start, stop: rows[start:stop]


def _inputs(checkpoint: Checkpoint) -> list[Path]:
    return [*checkpoint.folder.iterdir(), *{tensor.file for tensor in checkpoint.tensors.values()}]
