"""Adapters of a bundle: checked against the base, and stacked slot over slot as llama.cpp's `graniteswitch` reads them.

Every pair is filled up with zero ranks to the largest rank of all; a matrix that an adapter leaves alone has zeros. The
scale of an adapter, and what its file asks for, is in B before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from converters.adapter_file import AdapterFile
from converters.block_types import TYPES
from converters.bundle_layout import BASE_ARCHITECTURE, MATRICES, MAX_ADAPTERS, MAX_RANK, Sizes
from converters.errors import BaseMismatchError, UnsupportedAdapterError, UnsupportedError, listed
from converters.gguf_adapter import GGUFAdapter, open_gguf_adapter
from converters.pairs import Pair, blended
from converters.quantize import Floats
from converters.reader import GGUFHeader
from converters.stream import Source
from converters.tensor_kinds import EMBEDDING, OUTPUT
from converters.writer import TensorSpec

INVOCATION = "adapter.alora.invocation_tokens"
STACK_TYPES = ("f16", "bf16", "f32")
_NO_MATRIX = {EMBEDDING: "an adapter of the embeddings", OUTPUT: "an adapter of the output"}


@dataclass(frozen=True)
class Member:
    """An adapter to be bundled.

    Attributes:
        name: what requests call it; its control token is `<|NAME|>`.
        path: a GGUF adapter.
        scale: how strongly it is applied, for good.
        substitute: id of the token that its control token stands for: the first of a conversation.
    """

    name: str
    path: Path
    scale: float
    substitute: int


@dataclass(frozen=True)
class Stacks:
    """The adapters of a bundle, open to be read.

    Attributes:
        rank: of every pair in the file.
        dtype: of the stacks, one of `STACK_TYPES`.
        rounding: the largest relative error that storing them makes, in any of them.
        notices: of what storing them does, by adapter.
    """

    members: tuple[Member, ...]
    pairs: tuple[dict[str, Pair], ...]
    sizes: Sizes
    rank: int
    dtype: str
    rounding: float
    notices: tuple[str, ...]

    def sources(self) -> Iterator[Source]:
        """All stacks, A and B of every matrix of every layer."""
        for layer in range(self.sizes.layers):
            for matrix in MATRICES:
                rows, columns = self.sizes.shape(matrix)
                slots = [pairs.get(f"blk.{layer}.{matrix}.weight") for pairs in self.pairs]
                yield self._source(f"blk.{layer}.{matrix}.lora_a", slots, (self.rank, columns), 1)
                yield self._source(f"blk.{layer}.{matrix}.lora_b", slots, (rows, self.rank), 0)

    def _source(self, name: str, slots: Sequence[Pair | None], shape: tuple[int, int], side: int) -> Source:
        spec = TensorSpec(name, (len(slots) + 1, *shape), TYPES[self.dtype.upper()])
        # One slot at a time, so that no pair is read twice for one tensor.
        return Source(spec, read=partial(_rows, slots, shape, side), chunk_bytes=4 * shape[0] * shape[1])


def _rows(slots: Sequence[Pair | None], shape: tuple[int, int], side: int, start: int, stop: int) -> Floats:
    """Rows of a stack, which is (slots + 1, rows of one, columns)."""
    each, columns = shape
    out = np.zeros((stop - start, columns), np.float32)
    for number in range(start // each, (stop - 1) // each + 1):
        pair = slots[number - 1] if number else None
        if pair is None:
            continue
        factor, first = pair.load()[side], number * each
        begin, end = max(start, first), min(stop, first + len(factor))
        if begin < end:
            out[begin - start : end - start, : factor.shape[1]] = factor[begin - first : end - first]
    return out


def open_stacks(
    members: Sequence[Member], base: GGUFHeader, sizes: Sizes, dtype: str | None, stack: ExitStack
) -> Stacks:
    """Open and check adapters.

    Args:
        dtype: one of `STACK_TYPES`; None is what holds the values of all of them.
        stack: closes them.

    Raises:
        UnsupportedAdapterError: adapters that have no place in a bundle, by name.
        BaseMismatchError: matrices that do not fit the base.
    """
    if not 0 < len(members) <= MAX_ADAPTERS:
        raise UnsupportedError(f"{len(members)} adapters; a bundle has 1 to {MAX_ADAPTERS}")
    opened = [stack.enter_context(open_gguf_adapter(member.path)) for member in members]
    _check_fit(members, opened, base, sizes)
    scaled = [_scaled(file.pairs, member.scale) for member, file in zip(members, opened, strict=True)]
    checks = _checked(members, scaled, base, (dtype or _common_type(opened)).lower())
    dtype = "f32" if any(check.dtype == "f32" for check in checks) else checks[0].dtype
    rank = max(pair.rank for pairs in scaled for pair in pairs)
    return Stacks(
        members=tuple(members),
        pairs=tuple({pair.tensor: pair for pair in pairs} for pairs in scaled),
        sizes=sizes,
        rank=rank + rank % 2,  # CUDA multiplies rows of even length (ggml/src/ggml-cuda/mmvf.cu)
        dtype=dtype,
        rounding=0.0 if dtype == "f32" else max(check.rounding for check in checks),
        notices=tuple(_told(members, [check.notices for check in checks])),
    )


def _check_fit(members: Sequence[Member], opened: Sequence[GGUFAdapter], base: GGUFHeader, sizes: Sizes) -> None:
    if refused := [*_told(members, map(_refusals, opened))]:
        raise UnsupportedAdapterError(
            f"{base.path}: adapters that cannot be bundled:{listed(refused)}",
            hint="Serve them beside the base: edgelora chat --base BASE --adapter ADAPTER.",
        )
    if misfits := [*_told(members, (_misfits(file, base, sizes) for file in opened))]:
        raise BaseMismatchError(
            f"{base.path}: adapters that do not fit this base:{listed(misfits)}",
            hint="Give the base that they were trained on.",
        )


def _checked(
    members: Sequence[Member], scaled: Sequence[Sequence[Pair]], base: GGUFHeader, dtype: str
) -> list[AdapterFile]:
    """What storing does to each adapter's values. Of what one is encoded to for that, nothing is kept for the next."""
    checks = [replace(AdapterFile.of(BASE_ARCHITECTURE, pairs, dtype), encoded={}) for pairs in scaled]
    if broken := [*_told(members, [check.problems for check in checks])]:
        raise UnsupportedAdapterError(
            f"{base.path}: adapters that cannot be stored:{listed(broken)}",
            hint="Convert them again, or give --dtype f32.",
        )
    return checks


def _told(members: Sequence[Member], each: Iterable[Iterable[str]]) -> Iterator[str]:
    """What is said of each adapter, under its name."""
    for member, problems in zip(members, each, strict=True):
        yield from (f"adapter {member.name}: {problem}" for problem in problems)


def _refusals(file: GGUFAdapter) -> Iterator[str]:
    if file.header.metadata.get(INVOCATION):
        yield "an activated LoRA (aLoRA): it acts from its invocation tokens on, and a bundle's from the first token"
    for pair in file.pairs:
        if reason := _NO_MATRIX.get(pair.tensor) or ("an adapter of experts" if "_exps" in pair.tensor else ""):
            yield f"{pair.tensor}: {reason}"
        elif pair.tensor.removesuffix(".weight").rpartition(".")[2] not in MATRICES:
            yield f"{pair.tensor}: no matrix that a bundle switches"
        if pair.rank > MAX_RANK - 1:
            yield f"{pair.tensor}: rank {pair.rank}; a bundle has ranks below {MAX_RANK}"


def _misfits(file: GGUFAdapter, base: GGUFHeader, sizes: Sizes) -> Iterator[str]:
    if file.header.architecture != base.architecture:
        yield f"its architecture is {file.header.architecture}, the base's {base.architecture}"
        return
    for pair in file.pairs:
        tensor = base.tensors.get(pair.tensor)
        if tensor is None:
            yield f"{pair.tensor}: the base has {sizes.layers} layers"
        elif pair.shape != tensor.shape:
            yield f"{pair.tensor}: adapter {_cross(pair.shape)}, base {_cross(tensor.shape)}"


def _cross(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _scaled(pairs: Sequence[Pair], scale: float) -> tuple[Pair, ...]:
    return tuple(pairs) if scale == 1.0 else tuple(blended([(pair, scale)]) for pair in pairs)


def _common_type(files: Sequence[GGUFAdapter]) -> str:
    """The type that every adapter has; float32 where they differ, or are quantized."""
    kinds = {tensor.type_name.lower() for file in files for tensor in file.header.tensors.values()}
    return kinds.pop() if len(kinds) == 1 and kinds <= set(STACK_TYPES) else "f32"
