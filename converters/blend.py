"""Several adapters as one: ranks side by side, or factors added up.

`cat` is the exact sum of the changes, of as many ranks as all of them have. `linear` adds the factors themselves, as
PEFT's `add_weighted_adapter(combination_type="linear")` does: of the rank of one, and with products between different
adapters in it (peft/tuners/lora/model.py, `_generalized_task_arithmetic_weighted_adapter`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np

from converters.adapted_base import AdaptedBase, open_base
from converters.adapter import AdapterOptions, PreparedAdapter, prepared_pairs, source_pairs
from converters.architectures import Place
from converters.base_file import read_base_header
from converters.checkpoint import Floats
from converters.errors import BaseMismatchError, UnsupportedAdapterError, listed
from converters.gguf_adapter import open_gguf_adapter
from converters.methods.lora import INVOCATION
from converters.model_card import readable_name
from converters.pairs import Pair, blended
from converters.reader import RawValue
from converters.tensor_kinds import EMBEDDING
from converters.writer import Value

OF_A_CONTRACT = ("edgelora.", "tokenizer.")  # keys: the caller writes those of the new adapter
WAYS = ("cat", "linear")


@dataclass(frozen=True)
class Part:
    """One adapter of a blend: a folder or a GGUF file, and its weight."""

    path: Path
    weight: float


@dataclass(frozen=True)
class _Opened:
    part: Part
    pairs: tuple[Pair, ...]
    architecture: str
    fingerprint: str
    base_name: str
    keys: dict[str, Value]
    is_approximate: bool = False
    from_quantized: bool = False
    notices: tuple[str, ...] = ()


@contextmanager
def prepare_blend(
    parts: Sequence[Part],
    base: Path | None,
    options: AdapterOptions | None = None,
    *,
    way: str = "cat",
    force: bool = False,
) -> Iterator[PreparedAdapter]:
    """Everything about a blend but its file.

    Args:
        parts: adapters of one base; of one part alone it is a copy of another type.
        base: it; needed where one of the parts is a folder.
        way: one of `WAYS`.
        force: take adapters that were made for other bases, where their tensors fit.

    Raises:
        BaseMismatchError: adapters of different bases, or tensors that do not fit the base.
        UnsupportedAdapterError: adapters that cannot be blended that way.
        ConversionError: a part that cannot be converted or read.
    """
    options = options or AdapterOptions()
    with ExitStack() as stack:
        known = stack.enter_context(open_base(base)) if base else None
        opened = [stack.enter_context(_open(part, known, options)) for part in parts]
        _check_bases(opened, known, force=force)
        _check_invocations(opened)
        first, pairs = opened[0], _blended(opened, way)
        if known is not None:
            _check_fit(first.part.path, pairs, known)
        yield prepared_pairs(
            first.part.path,
            first.architecture,
            pairs,
            options,
            keys={**_common_keys(opened), **({} if known is None else _base_keys(known))},
            inputs=_files(*(part.path for part in parts), *([base] if base else [])),
            method="blend" if len(opened) > 1 else "LoRA",
            base_name=known.name if known else first.base_name,
            base_fingerprint=known.fingerprint if known else first.fingerprint,
            is_approximate=any(each.is_approximate for each in opened),
            notices=tuple(f"{each.part.path}: {notice}" for each in opened for notice in each.notices),
            from_quantized=any(each.from_quantized for each in opened),
        )


def _files(*paths: Path) -> tuple[Path, ...]:
    """What is read of adapters and a base."""
    return tuple(file for path in paths for file in (path.iterdir() if path.is_dir() else read_base_header(path).files))


def _common_keys(opened: Sequence[_Opened]) -> dict[str, Value]:
    """Metadata of the parts that still holds: nothing that a contract says, and of several no name of one."""
    kept = {
        key: value
        for key, value in opened[0].keys.items()
        if key.startswith("edgelora.base.") or not key.startswith(OF_A_CONTRACT)
    }
    if len(opened) == 1:
        return kept
    alone = [key for key in kept if key.startswith("general.") and key != "general.architecture"]
    return {
        **{key: value for key, value in kept.items() if key not in alone},
        "general.name": " + ".join(readable_name(each.part.path) for each in opened),
    }


def _base_keys(base: AdaptedBase) -> dict[str, Value]:
    return {"edgelora.base.name": base.name, "edgelora.base.fingerprint": base.fingerprint}


def _check_invocations(opened: Sequence[_Opened]) -> None:
    """Raises:
    UnsupportedAdapterError: activated LoRAs among others, or with another invocation.
    """
    tokens = {repr(_decoded(each.keys.get(INVOCATION))) for each in opened}
    if len(tokens) > 1:
        lines = [f"{each.part.path}: {_decoded(each.keys.get(INVOCATION)) or 'always active'}" for each in opened]
        raise UnsupportedAdapterError(f"adapters that begin to act at different tokens do not blend:{listed(lines)}")


def _decoded(value: object) -> object:
    return value.decode() if isinstance(value, RawValue) else value


def _check_fit(path: Path, pairs: Sequence[Pair], base: AdaptedBase) -> None:
    """Raises:
    BaseMismatchError: tensors that the base has not, or of other sizes, or that llama.cpp would not adapt there.
    """
    if problems := [problem for pair in pairs if (problem := _misfit(pair, base))]:
        raise BaseMismatchError(f"{path}: does not fit the base {base.name}:{listed(problems)}")


def _misfit(pair: Pair, base: AdaptedBase) -> str:
    shape = base.shapes.get(pair.tensor)
    if shape != pair.shape:
        return f"{pair.tensor}: the adapter is for {pair.shape}, the base has {shape or 'no such tensor'}"
    if base.is_tied and pair.tensor == EMBEDDING:
        return f"{pair.tensor}: the base ties its embeddings to its output"
    layer = re.match(r"blk\.(\d+)\.", pair.tensor)
    rows = (row for row in base.family.rows if Place(row, int(layer[1]) if layer else None).gguf_name == pair.tensor)
    if any(not row.adaptable for row in rows):
        return f"{pair.tensor}: llama.cpp's {base.family.architecture} never applies an adapter to it"
    return ""


@contextmanager
def _open(part: Part, base: AdaptedBase | None, options: AdapterOptions) -> Iterator[_Opened]:
    if not part.path.is_dir():
        with open_gguf_adapter(part.path) as adapter:
            metadata = adapter.header.metadata
            yield _Opened(
                part,
                adapter.pairs,
                adapter.header.architecture,
                adapter.base_fingerprint,
                str(metadata.get("edgelora.base.name") or ""),
                adapter.keys,
            )
        return
    if base is None:
        raise BaseMismatchError(f"{part.path}: is a folder, and needs its base", hint="Name it with --base.")
    with source_pairs(part.path, base, replace(options, rank=None)) as (source, pairs, is_approximate):
        architecture = base.family.architecture
        yield _Opened(
            part, pairs, architecture, base.fingerprint, base.name, dict(source.reading.metadata), is_approximate,
            source.from_quantized, source.notices,
        )  # fmt: skip


def _check_bases(opened: Sequence[_Opened], base: AdaptedBase | None, *, force: bool) -> None:
    """Raises:
    BaseMismatchError: they were made for different bases, or not for `base`.
    """
    known = set() if force else {each.fingerprint for each in opened} - {""}
    architectures = {each.architecture for each in opened}
    if base is not None:
        architectures.add(base.family.architecture)
        known |= set() if force else {base.fingerprint}
    if len(known) <= 1 and len(architectures) == 1:
        return
    lines = [
        f"{each.part.path}: for {each.base_name or each.architecture} ({each.fingerprint[:12]})" for each in opened
    ]
    lines += [f"the base given: {base.name} ({base.fingerprint[:12]})"] if base else []
    raise BaseMismatchError(
        f"adapters of different bases have nothing in common:{listed(lines)}",
        hint="" if force or len(architectures) > 1 else "To take them all the same, where their tensors fit: --force.",
    )


def _blended(opened: Sequence[_Opened], way: str) -> tuple[Pair, ...]:
    by_tensor: dict[str, list[tuple[Pair, float]]] = {}
    for each in opened:
        for pair in each.pairs:
            by_tensor.setdefault(pair.tensor, []).append((pair, each.part.weight))
    problems = [
        problem for name, parts in by_tensor.items() if (problem := _problem(name, parts, way))
    ]  # fmt: skip
    if problems:
        raise UnsupportedAdapterError(
            f"cannot be blended ({way}):{listed(problems)}", hint="The exact sum is --blend-way cat, the default."
        )
    join = blended if way == "cat" else _linear
    return tuple(_with_known_scales(join(parts), parts) for parts in by_tensor.values())


def _with_known_scales(pair: Pair, parts: Sequence[tuple[Pair, float]]) -> Pair:
    """Where one of the scales is not known, that of the sum is not either."""
    return replace(pair, scales=()) if any(not each.scales for each, _ in parts) else pair


def _problem(name: str, parts: Sequence[tuple[Pair, float]], way: str) -> str:
    if len({pair.shape for pair, _ in parts}) > 1:
        return f"{name}: has different shapes, {' and '.join(str(pair.shape) for pair, _ in parts)}"
    if way == "linear" and len({pair.rank for pair, _ in parts}) > 1:
        return f"{name}: has different ranks, {' and '.join(str(pair.rank) for pair, _ in parts)}"
    if way == "linear" and any(len(pair.scales) != 1 or not pair.scales[0] for pair, _ in parts):
        return f"{name}: one of them does not say by what its B @ A was multiplied"
    if way == "linear" and any(pair.residual_energy for pair, _ in parts):
        return f"{name}: one of them is approximate: its factors are not those that PEFT would add up"
    return ""


def _linear(parts: Sequence[tuple[Pair, float]]) -> Pair:
    first = parts[0][0]
    return replace(first, load=partial(_sum_of_factors, tuple(parts)), scales=(1.0,))


def _sum_of_factors(parts: Sequence[tuple[Pair, float]]) -> tuple[Floats, Floats]:
    """sum(sqrt(w s) B) @ sum(sqrt(w s) A); the sign of w s goes to A, as PEFT puts it."""
    (*stack, rows, columns), rank = parts[0][0].shape, parts[0][0].rank
    total_b, total_a = np.zeros((*stack, rows, rank), np.float32), np.zeros((*stack, rank, columns), np.float32)
    for pair, weight in parts:
        b, a = pair.load()
        scale = pair.scales[0]
        root = sqrt(abs(weight * scale))
        total_b += b * np.float32(root / scale)
        total_a += a * np.float32(root if weight * scale >= 0 else -root)
    return total_b, total_a
