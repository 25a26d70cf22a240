"""Several adapters as one: ranks side by side, or factors added up.

`cat` is the exact sum of the changes, of as many ranks as all of them have. `linear` adds the factors themselves, as
PEFT's `add_weighted_adapter(combination_type="linear")` does: of the rank of one, and with products between different
adapters in it (peft/tuners/lora/model.py, `_generalized_task_arithmetic_weighted_adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path

import numpy as np

from converters.adapted_base import AdaptedBase, open_base
from converters.adapter import AdapterOptions, PreparedAdapter, prepared_pairs, source_pairs
from converters.checkpoint import Floats
from converters.errors import BaseMismatchError, UnsupportedAdapterError, listed
from converters.gguf_adapter import open_gguf_adapter
from converters.pairs import Pair, blended
from converters.writer import Value

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
    is_approximate: bool


@contextmanager
def prepare_blend(
    parts: Sequence[Part], base: Path | None, options: AdapterOptions | None = None, *, way: str = "cat"
) -> Iterator[PreparedAdapter]:
    """Everything about a blend but its file.

    Args:
        parts: adapters of one base.
        base: it; needed where one of the parts is a folder.
        way: one of `WAYS`.

    Raises:
        BaseMismatchError: adapters of different bases.
        UnsupportedAdapterError: adapters that cannot be blended that way.
        ConversionError: a part that cannot be converted or read.
    """
    options = options or AdapterOptions()
    with ExitStack() as stack:
        known = stack.enter_context(open_base(base)) if base else None
        opened = [stack.enter_context(_open(part, known, options)) for part in parts]
        _check_bases(opened, known)
        first = opened[0]
        pairs = _blended(opened, way)
        yield prepared_pairs(
            first.part.path,
            first.architecture,
            pairs,
            options,
            keys={**first.keys, **({} if known is None else _base_keys(known))},
            inputs=tuple(file for each in opened for file in _files(each.part.path)),
            method="blend" if len(opened) > 1 else "re-typed",
            base_name=known.name if known else first.base_name,
            base_fingerprint=known.fingerprint if known else first.fingerprint,
            is_approximate=any(each.is_approximate for each in opened),
        )


def _files(path: Path) -> list[Path]:
    return [*path.iterdir()] if path.is_dir() else [path]


def _base_keys(base: AdaptedBase) -> dict[str, Value]:
    return {"edgelora.base.name": base.name, "edgelora.base.fingerprint": base.fingerprint}


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
                False,
            )
        return
    if base is None:
        raise BaseMismatchError(f"{part.path}: is a folder, and needs its base", hint="Name it with --base.")
    with source_pairs(part.path, base, replace(options, rank=None)) as (source, pairs, is_approximate):
        architecture = base.family.architecture
        yield _Opened(
            part, pairs, architecture, base.fingerprint, base.name, dict(source.reading.metadata), is_approximate
        )


def _check_bases(opened: Sequence[_Opened], base: AdaptedBase | None) -> None:
    """Raises:
    BaseMismatchError: they were made for different bases, or not for `base`.
    """
    known = {each.fingerprint for each in opened} - {""}
    if base is not None:
        known.add(base.fingerprint)
    architectures = {each.architecture for each in opened}
    if len(known) > 1 or len(architectures) > 1:
        lines = [
            f"{each.part.path}: {each.base_name or each.architecture} ({each.fingerprint[:12]})" for each in opened
        ]
        raise BaseMismatchError(f"adapters of different bases cannot be blended:{listed(lines)}")


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
    return tuple(join(parts) for parts in by_tensor.values())


def _problem(name: str, parts: Sequence[tuple[Pair, float]], way: str) -> str:
    if len({pair.shape for pair, _ in parts}) > 1:
        return f"{name}: has different shapes, {' and '.join(str(pair.shape) for pair, _ in parts)}"
    if way == "linear" and len({pair.rank for pair, _ in parts}) > 1:
        return f"{name}: has different ranks, {' and '.join(str(pair.rank) for pair, _ in parts)}"
    if way == "linear" and any(len(pair.scales) != 1 or not pair.scales[0] for pair, _ in parts):
        return f"{name}: one of them does not say by what its B @ A was multiplied"
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
