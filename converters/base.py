"""A Hugging Face base to a GGUF file, in one pass: no intermediate file, and memory that does not grow with the model.

Rows are read, turned to float32, put in llama.cpp's order, quantized on every core and written in order; at any moment
a few chunks of `CHUNK_BYTES` are alive. A 70B model needs the memory of a 1B one.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from converters.architectures import Dimensions, Place
from converters.checkpoint import Checkpoint, Floats
from converters.errors import FormatError, listed
from converters.fingerprint import fingerprint_of
from converters.model import Model, describe, norms, understand
from converters.quant_types import ModelShape, choose_types, find_recipe
from converters.quantize import Bytes, quantize_rows
from converters.writer import TensorSpec, Value, check_output, create, file_size, header_bytes

Progress = Callable[[int, int, str], None]
"""Called with bytes written, bytes in all, and the tensor that is being written."""

CHUNK_BYTES = 4 << 20
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION, ggml/include/ggml.h


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
class Source:
    """One tensor to be made.

    Attributes:
        read: rows `start` to `stop` of it as float32, in llama.cpp's order; a vector is one row.
    """

    spec: TensorSpec
    read: Callable[[int, int], Floats]


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
        force: overwrite `out`, and write weights that are NaN or infinite.
        dry_run: plan and check everything, write nothing.

    Raises:
        ConversionError: a child of it that says what is wrong; nothing is left behind.
    """
    started = time.monotonic()
    with Checkpoint(Path(folder)) as checkpoint:
        plan = plan_base(checkpoint, quant, metadata or {})
        check_output(Path(out), plan.size_bytes, force=force, inputs=_inputs(checkpoint))
        notices = list(plan.notices)
        if not dry_run:
            notices += _write(plan, Path(out), threads or os.cpu_count() or 1, progress, force=force)
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


def plan_base(checkpoint: Checkpoint, quant: str, metadata: Mapping[str, Value]) -> Plan:
    """Decide every tensor's type and place, and the whole header.

    Raises:
        ConversionError: what cannot be converted, by name.
    """
    recipe, model = find_recipe(quant), understand(checkpoint)
    readers = _readers(checkpoint, model)
    shapes = {name: shape for name, (shape, _) in readers.items()}
    types = choose_types(shapes, recipe, model_shape(model.dimensions))
    sources = tuple(Source(TensorSpec(name, shapes[name], kind), readers[name][1]) for name, kind in types.items())
    fingerprint = fingerprint_of(model.dimensions, model.vocabulary.tokens, norms(checkpoint, model.places))
    pairs: dict[str, Value] = {
        **describe(checkpoint.folder, model.family.architecture, sum(prod(shape) for shape in shapes.values())),
        **model.hyperparameters,
        "general.file_type": recipe.file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        **model.vocabulary.metadata,
        "edgelora.fingerprint": fingerprint,
        **metadata,
    }
    header = header_bytes(pairs, [source.spec for source in sources])
    return Plan(checkpoint.folder, sources, pairs, model.notices, header)


def model_shape(sizes: Dimensions) -> ModelShape:
    return ModelShape(sizes.architecture, sizes.layers, sizes.heads, sizes.heads_kv)


Reader = Callable[[int, int], Floats]


def _readers(checkpoint: Checkpoint, model: Model) -> dict[str, tuple[tuple[int, ...], Reader]]:
    """GGUF name to shape and reader, of the checkpoint's tensors and of those that are computed."""
    readers: dict[str, tuple[tuple[int, ...], Reader]] = {}
    for name, place in model.places.items():
        readers[name] = checkpoint.tensors[place.hf_name].shape, _reader(checkpoint, place, model.dimensions)
    for name, values in model.family.computed(checkpoint.config).items():
        readers[name] = values.shape, partial(_rows_of, values.reshape(1, -1))
    return readers


def _rows_of(rows: Floats, start: int, stop: int) -> Floats:
    return rows[start:stop]


def _reader(checkpoint: Checkpoint, place: Place, dimensions: Dimensions) -> Reader:
    name, order = place.hf_name, place.row.row_order(dimensions)

    def read(start: int, stop: int) -> Floats:
        if order is None:
            return checkpoint.rows(name, start, stop)
        if place.suffix == "bias":
            return checkpoint.rows(name)[:, order]
        # A row order moves rows within a head, so the rows from the lowest to the highest are few more than are needed.
        picked = order[start:stop]
        low, high = int(picked.min()), int(picked.max()) + 1
        return checkpoint.rows(name, low, high)[picked - low]

    return read


@dataclass(frozen=True)
class _Chunk:
    source: Source
    data: Bytes
    is_finite: bool
    overflowed: bool
    is_last: bool


def _inputs(checkpoint: Checkpoint) -> list[Path]:
    return [*checkpoint.folder.iterdir(), *{tensor.file for tensor in checkpoint.tensors.values()}]


def _write(plan: Plan, out: Path, threads: int, progress: Progress | None, *, force: bool) -> list[str]:
    """Stream every tensor into the file; returns notices about values that are not finite.

    Raises:
        FormatError: weights that are not finite in the checkpoint, without `force`.
    """
    done, total = len(plan.header), plan.size_bytes
    broken: dict[str, str] = {}
    overflowed: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool, create(out, plan.header) as file:
        for chunk in _in_order(pool, _jobs(plan), ahead=threads + 2):
            name = chunk.source.spec.name
            file.write(chunk.data.data)
            done += chunk.data.nbytes
            if not chunk.is_finite:
                broken.setdefault(name, f"{name}: holds values that are NaN or infinite")
            elif chunk.overflowed:
                overflowed.setdefault(name, f"{name}: holds values too large for F16, which became infinite")
            if chunk.is_last:
                done += file.end_tensor(chunk.source.spec)
            if progress:
                progress(done, total, name)
        if broken and not force:
            raise FormatError(
                f"{plan.folder}: its weights are broken, nothing was written:{listed(list(broken.values()))}",
                hint="Download the model again, or write them as they are with --force.",
            )
    return list({**overflowed, **broken}.values())


def _jobs(plan: Plan) -> Iterator[Callable[[], _Chunk]]:
    for source in plan.sources:
        n_cols, n_rows = source.spec.shape[-1], prod(source.spec.shape[:-1])
        step = max(1, CHUNK_BYTES // (4 * n_cols))
        for start in range(0, n_rows, step):
            yield partial(_encode, source, start, min(n_rows, start + step), is_last=start + step >= n_rows)


def _encode(source: Source, start: int, stop: int, *, is_last: bool) -> _Chunk:
    """Read, reorder and quantize some rows; runs in a thread."""
    rows, block_type = source.read(start, stop), source.spec.block_type
    is_finite = bool(np.isfinite(rows).all())
    data = quantize_rows(rows, block_type)
    overflowed = block_type.name == "F16" and is_finite and _has_f16_infinity(data)
    return _Chunk(source, data, is_finite, overflowed, is_last)


def _has_f16_infinity(data: Bytes) -> bool:
    """By its bits: numpy's own test of float16 is ten times slower."""
    return bool((data.view(np.uint16) & np.uint16(0x7FFF)).max() >= 0x7C00)


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], _Chunk]], ahead: int) -> Iterator[_Chunk]:
    """Results in the order of the jobs, with at most `ahead` of them in memory."""
    waiting: deque[Future[_Chunk]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
