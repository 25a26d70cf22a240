"""A Hugging Face base to a GGUF file, in one pass: no intermediate file, and memory that does not grow with the model.

Every tensor's type and place is decided first (`plan_base`); then the weights stream through (`converters.stream`).
A 70B model needs the memory of a 1B one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from converters.architectures import Family
from converters.block_types import TYPES
from converters.checkpoint import Checkpoint, Floats
from converters.errors import UnsupportedError
from converters.fingerprint import UNTIED, fingerprint_of
from converters.job import BaseReport, Job, quantization_keys
from converters.model import Model, norms, understand
from converters.model_card import describe
from converters.model_shape import ModelShape
from converters.options import QuantizeOptions
from converters.quant_types import find_recipe
from converters.stream import CHUNK_BYTES, Progress, Source
from converters.tensor_kinds import EMBEDDING, OUTPUT
from converters.type_choice import choose
from converters.view import View
from converters.writer import TensorSpec, Value

__all__ = ["BaseReport", "Job", "Progress", "QuantizeOptions", "convert_base", "plan_base"]

TRANSPOSED_CHUNK_BYTES = 16 << 20  # each chunk of a transposed matrix reads all of it
"""Says of a file that its output was made of the embeddings, to which the model ties it."""
COMPUTED = "computed"
ReadRows = Callable[[int, int], Floats]


def convert_base(
    folder: Path,
    out: Path,
    *,
    options: QuantizeOptions | None = None,
    quant: str | None = None,
    threads: int | None = None,
    strict: bool | None = None,
    untie: bool | None = None,
    metadata: Mapping[str, Value] | None = None,
    progress: Progress | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> BaseReport:
    """Convert a model folder.

    Args:
        folder: config.json, safetensors and tokenizer files, as transformers writes them.
        out: the GGUF file to write; several are named after it.
        options: what to make of it.
        quant: this and `threads`, `strict` and `untie` are those of `options`, and win over it.
        metadata: more keys for the file; they win over those found in the folder.
        progress: see `Progress`.
        force: overwrite `out`.
        dry_run: plan and check everything, write nothing; the report has a `plan`.

    Raises:
        ConversionError: a child of it that says what is wrong; nothing is left behind.
    """
    given: dict[str, Any] = {"quant": quant, "threads": threads, "strict": strict, "untie": untie}
    asked = replace(options or QuantizeOptions(), **{key: value for key, value in given.items() if value is not None})
    with Checkpoint(Path(folder)) as checkpoint:
        job = plan_base(checkpoint, asked, metadata or {})
        return job.run(Path(out), asked, progress=progress, force=force, dry_run=dry_run)


def plan_base(checkpoint: Checkpoint, options: QuantizeOptions, metadata: Mapping[str, Value]) -> Job:
    """Decide every tensor's type and place, and all metadata.

    Raises:
        ConversionError: what cannot be converted, by name.
    """
    recipe, model = find_recipe(options.quant), understand(checkpoint)
    untied = _untied(model, options)
    tensors = {**_read(model), **untied, **_computed(model)}
    shapes = {name: source.spec.shape for name, source in tensors.items()}
    named: dict[str, Value] = {"general.architecture": model.family.architecture, **model.metadata}
    kept = frozenset(name for name, source in tensors.items() if source.read_blocks)
    block_types = {name: source.spec.block_type for name, source in tensors.items()}
    choice = choose(shapes, block_types, ModelShape.from_metadata(named), options, kept)
    sources = tuple(
        replace(tensors[name], spec=TensorSpec(name, shapes[name], kind), importance=choice.importance.get(name))
        for name, kind in choice.types.items()
    )
    fingerprint = fingerprint_of(model.sizes, model.vocabulary.tokens, norms(model))
    keys = quantization_keys(recipe.file_type, options)
    pairs: dict[str, Value] = {
        **describe(checkpoint.folder, model.family.architecture, shapes),
        **model.metadata,
        "general.file_type": keys["general.file_type"],
        "general.quantization_version": keys["general.quantization_version"],
        **model.vocabulary.metadata,
        "edgelora.fingerprint": fingerprint,
        **({UNTIED: True} if untied else {}),
        **{key: value for key, value in keys.items() if key.startswith("quantize.")},
        **metadata,
    }
    template = pairs.get("tokenizer.chat_template")
    return Job(
        sources=sources,
        stored=_stored(model, tensors),
        metadata=pairs,
        inputs=_inputs(checkpoint),
        weights=tuple({tensor.file for tensor in checkpoint.tensors.values()}),
        name=str(pairs["general.name"]),
        architecture=model.family.architecture,
        fingerprint=fingerprint,
        chat_template=template if isinstance(template, str) else None,
        notices=(
            *model.notices,
            *choice.notices,
            *_kept_notices(len(kept)),
            *untie_notices(options, is_untied=OUTPUT in model.views),
        ),
    )


def _kept_notices(count: int) -> list[str]:
    return [f"{count} tensors are MXFP4 in the checkpoint and stay so, whatever the quantization"] if count else []


def _read(model: Model) -> dict[str, Source]:
    return {name: _from_view(view) for name, view in model.views.items()}


def _from_view(view: View) -> Source:
    name = view.place.gguf_name
    if view.place.row.mxfp4:
        return Source(TensorSpec(name, view.shape, TYPES["MXFP4"]), read_blocks=view.read_blocks)
    chunk = TRANSPOSED_CHUNK_BYTES if view.is_transposed else CHUNK_BYTES
    return Source(TensorSpec(name, view.shape, TYPES["F32"]), view.read, chunk_bytes=chunk)


def _stored(model: Model, tensors: Mapping[str, Source]) -> dict[str, str]:
    """What each tensor is in the checkpoint."""
    found = dict.fromkeys(tensors, COMPUTED)
    for name, view in model.views.items():
        found[name] = "MXFP4" if view.place.row.mxfp4 else view.tensors.tensors[view.names[0]].dtype
    if OUTPUT in found and OUTPUT not in model.views:
        found[OUTPUT] = found[EMBEDDING]
    return found


def _untied(model: Model, options: QuantizeOptions) -> dict[str, Source]:
    """The embeddings once more as the output, where that is asked for.

    Raises:
        UnsupportedError: llama.cpp's graph of this family always takes the embeddings.
    """
    if not options.untie or OUTPUT in model.views:
        return {}
    check_can_untie(model.family)
    embedding = model.views[EMBEDDING]
    return {OUTPUT: Source(TensorSpec(OUTPUT, embedding.shape, TYPES["F32"]), embedding.read)}


def untie_notices(options: QuantizeOptions, *, is_untied: bool) -> list[str]:
    return ["--untie changes nothing: this model has an output of its own"] if options.untie and is_untied else []


def check_can_untie(family: Family) -> None:
    """Raises:
    UnsupportedError: llama.cpp's graph of this family always takes the embeddings.
    """
    if not family.can_untie:
        raise UnsupportedError(f"--untie: llama.cpp's {family.architecture} has no output tensor of its own")


def _computed(model: Model) -> dict[str, Source]:
    return {
        name: Source(TensorSpec(name, values.shape, TYPES["F32"]), _reader_of(values))
        for name, values in model.family.computed(model.config).items()
    }


def _reader_of(values: Floats) -> ReadRows:
    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]))
    return lambda start, stop: rows[start:stop]


def _inputs(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """All that lies beside the weights but GGUF files: those may be what an earlier conversion made."""
    beside = (path for path in checkpoint.folder.iterdir() if path.suffix != ".gguf")
    return (*beside, *{tensor.file for tensor in checkpoint.tensors.values()})
