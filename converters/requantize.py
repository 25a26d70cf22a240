"""A GGUF base to another quantization, byte for byte as llama-quantize makes it (`llama_model_quantize_impl`,
src/llama-quant.cpp), one difference apart: `general.alignment` is kept and obeyed, where llama-quantize keeps the key,
pads to 32 bytes all the same, and writes a file that llama.cpp cannot read.

Nothing but the file is looked at, so architectures that no table here knows convert too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from converters.architectures import find_gguf_family
from converters.base import check_can_untie, untie_notices
from converters.base_file import BaseFile
from converters.block_types import PLAIN, TYPES, BlockType
from converters.errors import FormatError, UnsupportedArchitectureError, UnsupportedError, listed
from converters.fingerprint import TOKENS, UNTIED, fingerprint_of_header
from converters.job import BaseReport, Job, quantization_keys
from converters.model_shape import ModelShape
from converters.options import QuantizeOptions
from converters.quant_types import RECIPES, find_recipe, tensor_order
from converters.reader import GGUFHeader, RawValue
from converters.split import KEYS as SPLIT_KEYS
from converters.stream import Progress, Source
from converters.tensor_kinds import EMBEDDING, OUTPUT
from converters.type_choice import TypeChoice, choose
from converters.writer import TensorSpec, Value

__all__ = ["BaseReport", "QuantizeOptions", "plan_requantize", "requantize"]

_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64")


def requantize(
    source: Path,
    out: Path,
    options: QuantizeOptions | None = None,
    *,
    keep_types: bool = False,
    metadata: Mapping[str, Value] | None = None,
    progress: Progress | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> BaseReport:
    """Quantize a GGUF base again, or write it once more with its output as a tensor of its own.

    Args:
        source: the file, or any part of a split one.
        out: the GGUF file to write; several are named after it.
        options: what to make of it.
        keep_types: untie it, every tensor of the type that it has; the quantization that `options` name is not made.
        metadata: more keys for the file; they win over the source's.
        progress: see `Progress`.
        force: overwrite `out`.
        dry_run: plan and check everything, write nothing; the report has a `plan`.

    Raises:
        UnsupportedError: an adapter, or tensors that have been quantized already (see `QuantizeOptions`); or
            llama.cpp's graph of this family always takes the embeddings for its output.
        ConversionError: another child of it that says what is wrong; nothing is left behind.
    """
    options = options or QuantizeOptions()
    with BaseFile(source) as base:
        job = (_plan_untied if keep_types else plan_requantize)(base, options, metadata or {})
        report = job.run(Path(out), options, progress=progress, force=force, dry_run=dry_run)
        return replace(report, quant=recipe_of(job.metadata)) if keep_types else report


def recipe_of(metadata: Mapping[str, Value]) -> str:
    """The name of a file's recipe; "mixed" where it has none."""
    value = metadata.get("general.file_type")
    number = value.decode() if isinstance(value, RawValue) else value
    return next((name for name, recipe in RECIPES.items() if recipe.file_type == number), "mixed")


@dataclass(frozen=True)
class _Taken:
    """A tensor of the file, and the name that it gets.

    Attributes:
        shape: in numpy order, without dimensions of 1 in front: ggml knows none (`ggml_n_dims`).
    """

    source: str
    shape: tuple[int, ...]
    block_type: BlockType


def plan_requantize(base: BaseFile, options: QuantizeOptions, metadata: Mapping[str, Value]) -> Job:
    """Decide every tensor's type, and all metadata.

    Raises:
        ConversionError: what cannot be converted, by name.
    """
    header, recipe = base.header, find_recipe(options.quant)
    if header.kind == "adapter":
        raise UnsupportedError(
            f"{header.path}: a GGUF adapter, and adapters are not quantized again",
            hint="Give a base; an adapter is converted from its PEFT folder.",
        )
    if not header.tensors:
        raise FormatError(
            f"{header.path}: has no tensors: a vocabulary, and no model", hint="Give a file with weights."
        )
    taken = _tensors(header, options)
    stored = {name: item.block_type for name, item in taken.items()}
    shapes = {name: item.shape for name, item in taken.items()}
    choice = choose(shapes, stored, ModelShape.from_metadata(header.metadata), options)
    _check_sources(header, stored, choice, options)
    changed = frozenset(choice.changed)
    sources = tuple(_source(base, name, taken[name], choice, name in changed) for name in choice.types)
    return _job(
        header,
        sources,
        stored,
        {**quantization_keys(recipe.file_type, options), **metadata},
        [*choice.notices, *untie_notices(options, is_untied=OUTPUT in header.tensors)],
    )


def _plan_untied(base: BaseFile, options: QuantizeOptions, metadata: Mapping[str, Value]) -> Job:
    job = plan_as_it_is(base, metadata, untie=True)
    return replace(job, notices=(*job.notices, *untie_notices(options, is_untied=OUTPUT in base.header.tensors)))


def plan_as_it_is(base: BaseFile, metadata: Mapping[str, Value], *, untie: bool = False) -> Job:
    """The same file once more, every tensor of its own type.

    Args:
        metadata: more keys; they win over the file's.
        untie: with the embeddings once more as the output, where they stand for it.

    Raises:
        ConversionError: the output cannot be a tensor of its own.
    """
    header = base.header
    taken = _tensors(header, QuantizeOptions(untie=untie))
    sources = tuple(
        Source(TensorSpec(name, item.shape, item.block_type), read_blocks=partial(base.blocks, item.source))
        for name, item in sorted(taken.items(), key=lambda pair: tensor_order(pair[0]))
    )
    return _job(header, sources, {name: item.block_type for name, item in taken.items()}, metadata)


def _job(
    header: GGUFHeader,
    sources: tuple[Source, ...],
    stored: Mapping[str, BlockType],
    metadata: Mapping[str, Value],
    notices: Sequence[str] = (),
) -> Job:
    fingerprint, doubts = _fingerprint(header)
    template = metadata.get("tokenizer.chat_template", header.metadata.get("tokenizer.chat_template"))
    return Job(
        sources=sources,
        stored={name: kind.name for name, kind in stored.items()},
        metadata=_metadata(header, metadata, is_untied=OUTPUT in stored and OUTPUT not in header.tensors),
        inputs=header.files,
        weights=header.files,
        name=str(metadata.get("general.name") or header.metadata.get("general.name") or header.path.stem),
        architecture=header.architecture,
        fingerprint=fingerprint,
        chat_template=template if isinstance(template, str) else None,
        notices=(*notices, *doubts),
        alignment=header.alignment,
    )


def _tensors(header: GGUFHeader, options: QuantizeOptions) -> dict[str, _Taken]:
    taken = {
        name: _Taken(name, _trimmed(tensor.shape), TYPES[tensor.type_name]) for name, tensor in header.tensors.items()
    }
    if not options.untie or OUTPUT in taken:
        return taken
    try:
        check_can_untie(find_gguf_family(header.architecture, header.path))
    except UnsupportedArchitectureError:
        raise UnsupportedError(
            f"--untie: whether llama.cpp's {header.architecture} has an output tensor of its own is not known here",
            hint="Leave --untie out; or add the family in converters/architectures/.",
        ) from None
    if EMBEDDING not in taken:
        raise FormatError(f"{header.path}: has no {EMBEDDING} to make an output of")
    return {**taken, OUTPUT: taken[EMBEDDING]}


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((index for index, size in enumerate(shape[:-1]) if size != 1), len(shape) - 1)
    return shape[first:]


def _check_sources(
    header: GGUFHeader, stored: Mapping[str, BlockType], choice: TypeChoice, options: QuantizeOptions
) -> None:
    if strange := [f"{name} ({stored[name].name})" for name in choice.changed if stored[name].name in _NO_WEIGHTS]:
        raise UnsupportedError(f"{header.path}: cannot be quantized, these are no weights:{listed(strange)}")
    lossy = [name for name in choice.changed if stored[name].name not in PLAIN]
    if lossy and not options.allow_requantize:
        types = ", ".join(sorted({stored[name].name for name in lossy}))
        raise UnsupportedError(
            f"{header.path}: is quantized already: {len(lossy)} tensors are {types}, and quantizing them again loses "
            "more than either quantization does",
            hint="Start from the F16, BF16 or F32 file, or from the Hugging Face folder; or accept the loss with "
            "--allow-requantize.",
        )


def _source(base: BaseFile, name: str, item: _Taken, choice: TypeChoice, is_changed: bool) -> Source:
    spec = TensorSpec(name, item.shape, choice.types[name])
    if is_changed:
        return Source(spec, read=partial(base.rows, item.source), importance=choice.importance.get(name))
    return Source(spec, read_blocks=partial(base.blocks, item.source))


def _metadata(header: GGUFHeader, new: Mapping[str, Value], *, is_untied: bool) -> dict[str, Value]:
    """The file's values as they lie there; what is set again goes to the end (`gguf_set_val_u32`)."""
    new = {UNTIED: True, **new} if is_untied else new
    kept = {key: header.metadata.raw(key) for key in header.metadata if key not in new and key not in SPLIT_KEYS}
    return {**kept, **new}


def _fingerprint(header: GGUFHeader) -> tuple[str, list[str]]:
    if TOKENS not in header.metadata:
        return "", []
    try:
        return fingerprint_of_header(header), []
    except FormatError as error:
        return "", [f"adapters cannot tell this base: {error.message}"]
