"""The tensors of a GGUF adapter, A and B of each tensor that it changes, before they are written.

    blk.0.attn_q.weight.lora_a          (rank, columns)     or (experts, rank, columns)
    blk.0.attn_q.weight.lora_b          (rows, rank)        or (experts, rows, rank)
    token_embd.weight.lora_a, .lora_b   (vocabulary, rank), (embedding, rank): looked up by row

Format: `llama_adapter_lora_init_impl`, src/llama-adapter.cpp in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import numpy as np

from converters.checkpoint import Floats
from converters.low_rank import shorten
from converters.methods import LowRank
from converters.placement import Slot

EMBEDDING = "token_embd.weight"
Load = Callable[[], tuple[Floats, Floats]]


@dataclass(frozen=True)
class Pair:
    """W + B @ A of one tensor of the base.

    Attributes:
        tensor: of the base ("blk.0.attn_q.weight").
        shape: of the base's tensor, in numpy order.
        load: B (rows, rank) and A (rank, columns), of a stack (experts, rows, rank) and (experts, rank, columns);
            float32, the scale in B.
        scales: what PEFT multiplied B @ A by, of all that went into it.
        residual_energy: the share of the change's energy that B @ A leaves out.
    """

    tensor: str
    shape: tuple[int, ...]
    rank: int
    load: Load
    scales: tuple[float, ...] = ()
    residual_energy: float = 0.0

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and of B, as the file has them."""
        *stack, rows, columns = self.shape
        if self.tensor == EMBEDDING:
            return (rows, self.rank), (columns, self.rank)
        return (*stack, self.rank, columns), (*stack, rows, self.rank)

    def stored(self) -> tuple[Floats, Floats]:
        """A and B as the file has them."""
        b, a = self.load()
        return (b, np.ascontiguousarray(a.T)) if self.tensor == EMBEDDING else (a, b)


@dataclass(frozen=True)
class Piece:
    """A low-rank change and where its rows go."""

    change: LowRank
    slot: Slot


def assemble(tensor: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> Pair:
    """One pair of all changes to a tensor: their ranks stand beside one another, each with its own rows.

    Args:
        shape: of the base's tensor.
    """
    scales = tuple(sorted({piece.change.scale for piece in pieces}))
    if len(pieces) == 1 and len(shape) == 2:
        return Pair(tensor, shape, pieces[0].change.rank, partial(_one, shape, pieces[0]), scales)
    rank = max(_ranks(shape, pieces))
    load = partial(_many, shape, rank, tuple(pieces))
    return Pair(tensor, shape, rank, load, scales)


def _one(shape: tuple[int, ...], piece: Piece) -> tuple[Floats, Floats]:
    b, a = piece.change.load()
    return _placed(b, shape[0], piece.slot), _columns(a, piece.slot)


def _placed(b: Floats, rows: int, slot: Slot) -> Floats:
    if len(slot.rows) == rows:  # all of them
        return b if len(b) == rows and _is_identity(slot, rows) else b[slot.source[np.argsort(slot.rows)]]
    whole = np.zeros((rows, b.shape[-1]), np.float32)
    whole[slot.rows] = b[slot.source]
    return whole


def _is_identity(slot: Slot, rows: int) -> bool:
    everything = np.arange(rows)
    return np.array_equal(slot.source, everything) and np.array_equal(slot.rows, everything)


def _columns(a: Floats, slot: Slot) -> Floats:
    return a if slot.columns is None else np.ascontiguousarray(a[..., slot.columns])


def _matrices(slot: Slot, rows: int) -> list[int]:
    """The numbers of a stack's matrices that a slot lies in."""
    return [int(number) for number in np.unique(slot.rows // rows)]


def _ranks(shape: tuple[int, ...], pieces: Sequence[Piece]) -> list[int]:
    """How many ranks each matrix gets."""
    ranks = [0] * prod(shape[:-2])
    for piece in pieces:
        for matrix in _matrices(piece.slot, shape[-2]):
            ranks[matrix] += piece.change.rank
    return ranks


def _many(shape: tuple[int, ...], rank: int, pieces: Sequence[Piece]) -> tuple[Floats, Floats]:
    *stack, rows, columns = shape
    count = prod(stack)
    b, a = np.zeros((count, rows, rank), np.float32), np.zeros((count, rank, columns), np.float32)
    used = [0] * count
    for piece in pieces:
        of_b, of_a = piece.change.load()
        slot = piece.slot
        for matrix in _matrices(slot, rows):
            inside = slot.rows // rows == matrix
            part = slice(used[matrix], used[matrix] + piece.change.rank)
            source, each = slot.source[inside], of_b.shape[-2]
            number = int(source[0]) // each  # which of the change's own matrices
            own_b = of_b if of_b.ndim == 2 else of_b[number]
            own_a = of_a if of_a.ndim == 2 else of_a[number]
            b[matrix, slot.rows[inside] % rows, part] = own_b[source % each]
            a[matrix, part] = _columns(own_a, slot)
            used[matrix] += piece.change.rank
    return b.reshape(*stack, rows, rank), a.reshape(*stack, rank, columns)


def multiplied(pair: Pair, factors: Floats) -> Pair:
    """A stack's pair with each matrix's change multiplied, by float32 (experts,)."""

    def load() -> tuple[Floats, Floats]:
        b, a = pair.load()
        return b * factors[:, None, None], a

    return replace(pair, load=load)


def blended(parts: Sequence[tuple[Pair, float]]) -> Pair:
    """The weighted sum of changes to one tensor: ranks beside one another, the weight in B."""
    first = parts[0][0]
    scales = tuple(sorted({scale * weight for pair, weight in parts for scale in pair.scales}))
    residual = max(pair.residual_energy for pair, _ in parts)
    rank = sum(pair.rank for pair, _ in parts)
    return replace(first, rank=rank, load=partial(_blend, tuple(parts)), scales=scales, residual_energy=residual)


def _blend(parts: Sequence[tuple[Pair, float]]) -> tuple[Floats, Floats]:
    loaded = [(pair.load(), weight) for pair, weight in parts]
    b = np.concatenate([b * np.float32(weight) for (b, _), weight in loaded], axis=-1)
    return b, np.concatenate([a for (_, a), _ in loaded], axis=-2)


def shortened(pair: Pair, *, rank: int | None, max_error: float) -> Pair:
    """A pair of fewer ranks; as it is, where it has no more than `rank`."""
    if rank is not None and pair.rank <= rank:
        return pair
    b, a = pair.load()
    stack = b.shape[:-2]
    found = [
        shorten(one_b, one_a, rank=rank, max_error=max_error)
        for one_b, one_a in zip(b.reshape(-1, *b.shape[-2:]), a.reshape(-1, *a.shape[-2:]), strict=True)
    ]
    kept = max(each.rank for each in found)
    new_b = np.stack([_padded(each.b, kept, axis=1) for each in found]).reshape(*stack, -1, kept)
    new_a = np.stack([_padded(each.a, kept, axis=0) for each in found]).reshape(*stack, kept, -1)
    residual = max(pair.residual_energy, max(each.residual_energy for each in found))
    return replace(pair, rank=kept, load=lambda: (new_b, new_a), residual_energy=residual)


def _padded(matrix: Floats, rank: int, axis: int) -> Floats:
    missing = rank - matrix.shape[axis]
    return np.pad(matrix, [(0, missing if axis == dimension else 0) for dimension in range(2)])
