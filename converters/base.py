"""A Hugging Face base to a GGUF file, in one pass: no intermediate file, and memory that does not grow with the model.

Rows are read, turned to float32, put in llama.cpp's order, quantized on every core and written in order; at any moment a few
chunks of `CHUNK_BYTES` are alive. A 70B model needs the memory of a 1B one.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from converters.architectures import Dimensions, Family, Place, find_family
from converters.checkpoint import Checkpoint, Floats
from converters.errors import FormatError, UnsupportedError, listed
from converters.fingerprint import fingerprint_of
from converters.quant_types import ModelShape, choose_types, find_recipe
from converters.quantize import Bytes, quantize_rows
from converters.tokenizer import Vocabulary, load_vocabulary
from converters.writer import TensorSpec, Typed, Value, check_output, create, file_size, header_bytes

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
    """One tensor to be made: from rows of the checkpoint, or computed."""

    spec: TensorSpec
    place: Place | None
    computed: Floats | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first weight is read."""

    family: Family
    dimensions: Dimensions
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
        force: overwrite `out`.
        dry_run: plan and check everything, write nothing.

    Raises:
        ConversionError: a child of it that says what is wrong; nothing is left behind.
    """
    started = time.monotonic()
    with Checkpoint(Path(folder)) as checkpoint:
        plan = plan_base(checkpoint, quant, metadata or {})
        check_output(Path(out), plan.size_bytes, force=force)
        notices = list(plan.notices)
        if not dry_run:
            notices += _write(checkpoint, plan, Path(out), threads or os.cpu_count() or 1, progress)
    template = plan.metadata.get("tokenizer.chat_template")
    return BaseReport(
        path=Path(out),
        size_bytes=plan.size_bytes,
        n_tensors=len(plan.sources),
        types=dict(Counter(spec.block_type.name for spec in plan.specs)),
        seconds=time.monotonic() - started,
        name=str(plan.metadata["general.name"]),
        architecture=plan.family.architecture,
        quant=quant.lower(),
        fingerprint=str(plan.metadata["edgelora.fingerprint"]),
        chat_template=template if isinstance(template, str) else None,
        notices=tuple(notices),
    )


@dataclass(frozen=True)
class Model:
    """A checkpoint understood: its family, sizes, vocabulary, and where each tensor goes."""

    family: Family
    dimensions: Dimensions
    hyperparameters: Mapping[str, Any]
    vocabulary: Vocabulary
    places: Mapping[str, Place]
    notices: tuple[str, ...]


def understand(checkpoint: Checkpoint) -> Model:
    """Match a model folder with its family; every problem is in one message.

    Raises:
        UnsupportedError: configuration or tensors that this family cannot take.
        FormatError: tensors that are missing or have a shape that config.json contradicts.
    """
    config, folder = checkpoint.config, checkpoint.folder
    family = find_family(config, folder)
    if problems := family.problems(config):
        raise UnsupportedError(f"{folder / 'config.json'}: cannot be converted exactly:{listed(problems)}")
    hyperparameters = family.hyperparameters(config)
    named = {"general.architecture": family.architecture, **hyperparameters}
    dimensions = Dimensions.from_metadata(named, config["vocab_size"])
    places = _places(checkpoint, family, dimensions)
    vocabulary = load_vocabulary(folder, config["vocab_size"])
    notices = (*family.notices(config), *vocabulary.notices)
    return Model(family, dimensions, hyperparameters, vocabulary, places, notices)


def _places(checkpoint: Checkpoint, family: Family, dimensions: Dimensions) -> dict[str, Place]:
    """GGUF name to place, for every tensor of the checkpoint that is written."""
    tied = bool(checkpoint.config.get("tie_word_embeddings", False))
    found, problems = {}, []
    for name, tensor in checkpoint.tensors.items():
        place = family.from_hf(name)
        if name.endswith(family.ignored) or (tied and place is not None and place.gguf_module == "output"):
            continue
        if place is None:
            problems.append(f"{name}: no tensor of a {family.architecture} model")
            continue
        expected = place.row.shape_of(place.suffix, dimensions)
        if tensor.shape != expected:
            problems.append(f"{name}: has shape {tensor.shape}, config.json gives {expected}")
        found[place.gguf_name] = place
    for place in family.weights(dimensions):
        needed = place.row.required or (place.gguf_module == "output" and not tied)
        if needed and place.gguf_name not in found:
            problems.append(f"{place.hf_name}: is missing")
    if problems:
        raise FormatError(f"{checkpoint.folder}: its tensors do not fit its config.json:{listed(problems)}")
    return found


def plan_base(checkpoint: Checkpoint, quant: str, metadata: Mapping[str, Value]) -> Plan:
    """Decide every tensor's type and place, and the whole header."""
    recipe, model = find_recipe(quant), understand(checkpoint)
    sizes = model.dimensions
    shapes = {name: checkpoint.tensors[place.hf_name].shape for name, place in model.places.items()}
    computed = model.family.computed(checkpoint.config)
    shapes |= {name: values.shape for name, values in computed.items()}
    shape = ModelShape(model.family.architecture, sizes.layers, sizes.heads, sizes.heads_kv)
    types = choose_types(shapes, recipe, shape)
    sources = tuple(
        Source(TensorSpec(name, shapes[name], block_type), model.places.get(name), computed.get(name))
        for name, block_type in types.items()
    )
    n_parameters = sum(int(np.prod(shapes[name])) for name in shapes)
    fingerprint = fingerprint_of(sizes, model.vocabulary.tokens, norms(checkpoint, model.places))
    pairs: dict[str, Value] = {
        **describe(checkpoint.folder, model.family.architecture, n_parameters),
        **model.hyperparameters,
        "general.file_type": recipe.file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        **model.vocabulary.metadata,
        "edgelora.fingerprint": fingerprint,
        **metadata,
    }
    header = header_bytes(pairs, [source.spec for source in sources])
    return Plan(model.family, sizes, sources, pairs, model.notices, header)


def norms(checkpoint: Checkpoint, places: Mapping[str, Place]) -> Iterator[tuple[str, Floats]]:
    """GGUF name and values of every norm vector."""
    for name, place in places.items():
        if name.endswith("_norm.weight"):
            yield name, checkpoint.rows(place.hf_name)[0]


def describe(folder: Path, architecture: str, n_parameters: int) -> dict[str, Value]:
    """The `general.*` keys, from the model card, generation_config.json and the folder's name, as llama.cpp's converter."""
    folder = folder.resolve()
    try:
        card = gguf.Metadata.load(None, folder, None, n_parameters)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise FormatError(f"{folder}: its model card or generation_config.json cannot be understood ({error})") from None
    card.name = card.name or folder.name
    card.size_label = card.size_label or gguf.size_label(n_parameters, n_parameters, 0, 0)
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("model")
    card.set_gguf_meta_model(writer)
    return {key: _typed(pair) for key, pair in writer.kv_data[0].items()}


def _typed(pair: Any) -> Value:
    """gguf's value; an int32 keeps its type (`general.sampling.top_k`)."""
    return Typed("i", pair.value) if pair.type == gguf.GGUFValueType.INT32 else pair.value


@dataclass(frozen=True)
class _Chunk:
    source: Source
    data: Bytes
    is_finite: bool
    overflowed: bool
    is_last: bool


def _write(checkpoint: Checkpoint, plan: Plan, out: Path, threads: int, progress: Progress | None) -> list[str]:
    """Stream every tensor into the file; returns notices about values that are not finite."""
    done, total = len(plan.header), plan.size_bytes
    bad: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool, create(out, plan.header) as file:
        for chunk in _in_order(pool, _jobs(checkpoint, plan), ahead=threads + 2):
            name = chunk.source.spec.name
            file.write(chunk.data.data)
            done += chunk.data.nbytes
            if not chunk.is_finite:
                bad.setdefault(name, f"{name}: holds values that are NaN or infinite")
            elif chunk.overflowed:
                bad.setdefault(name, f"{name}: holds values too large for F16, which became infinite")
            if chunk.is_last:
                done += file.end_tensor(chunk.source.spec)
            if progress:
                progress(done, total, name)
    return list(bad.values())


def _jobs(checkpoint: Checkpoint, plan: Plan) -> Iterator[Callable[[], _Chunk]]:
    for source in plan.sources:
        n_cols = source.spec.shape[-1]
        n_rows = int(np.prod(source.spec.shape[:-1]))
        step = max(1, CHUNK_BYTES // (4 * n_cols))
        order = source.place.row.row_order(plan.dimensions) if source.place else None
        for start in range(0, n_rows, step):
            stop = min(n_rows, start + step)
            picked = None if order is None else order[start:stop]
            yield _Job(checkpoint, source, start, stop, picked, stop == n_rows)


@dataclass(frozen=True)
class _Job:
    """Read, reorder and encode some rows; runs in a thread."""

    checkpoint: Checkpoint
    source: Source
    start: int
    stop: int
    picked: Any
    is_last: bool

    def __call__(self) -> _Chunk:
        rows, block_type = self._rows(), self.source.spec.block_type
        is_finite = bool(np.isfinite(rows).all())
        data = quantize_rows(rows, block_type)
        overflowed = block_type.name == "F16" and is_finite and not bool(np.isfinite(data.view("<f2")).all())
        return _Chunk(self.source, data, is_finite, overflowed, self.is_last)

    def _rows(self) -> Floats:
        place = self.source.place
        if place is None:
            assert self.source.computed is not None  # a tensor comes from the checkpoint or is computed
            return self.source.computed.reshape(1, -1)
        if self.picked is None:
            return self.checkpoint.rows(place.hf_name, self.start, self.stop)
        # A row order moves rows within a head, so the rows between the lowest and highest are few more than are needed.
        low, high = int(self.picked.min()), int(self.picked.max()) + 1
        return self.checkpoint.rows(place.hf_name, low, high)[self.picked - low]


def _in_order(
    pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], _Chunk]], ahead: int
) -> Iterator[_Chunk]:
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
