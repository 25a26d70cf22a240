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
from math import inf, prod, sqrt

import numpy as np

from converters.checkpoint import Floats
from converters.low_rank import norm_of_product, shorten
from converters.methods import LowRank
from converters.placement import Slot
from converters.tensor_kinds import EMBEDDING

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
        residual_energy: the share of the change's energy that B @ A leaves out, at most:
            |change - B @ A|^2 / |change|^2.
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
    b, a = _factors(piece.change)
    return _placed(b, shape[0], piece.slot), _columns(a, piece.slot)


def _factors(change: LowRank) -> tuple[Floats, Floats]:
    """B and A; values that overflow become infinite, and are refused by name where they are looked at."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return change.load()


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
        of_b, of_a = _factors(piece.change)
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
    rank, residual = sum(pair.rank for pair, _ in parts), _residual_of_sum(parts)
    return replace(first, rank=rank, load=partial(_blend, tuple(parts)), scales=scales, residual_energy=residual)


def _residual_of_sum(parts: Sequence[tuple[Pair, float]]) -> float:
    """The share of its energy that a weighted sum leaves out, at most; infinite where nothing bounds it.

    What the parts leave out adds up at worst, and what they hold may cancel.
    """
    if len(parts) == 1:  # any multiple leaves out the same share
        return parts[0][0].residual_energy
    lost = sum(abs(weight) * _lost(pair) for pair, weight in parts if weight)
    if lost == 0.0:
        return 0.0
    least = norm_of_product(*_blend(parts)) - lost  # of the sum without any error
    return (lost / least) ** 2 if least > 0.0 else inf


def _lost(pair: Pair) -> float:
    """|change - B @ A| at most, of a pair that leaves out a share e of |change|: e / sqrt(1 - e^2) of |B @ A|.

    Of the best approximation exactly that, for it is orthogonal to what it leaves out; sums and cuts state an e for
    which that holds, too.
    """
    energy = pair.residual_energy
    if energy == 0.0:
        return 0.0
    return sqrt(energy / (1.0 - energy)) * norm_of_product(*pair.load()) if energy < 1.0 else inf


def _blend(parts: Sequence[tuple[Pair, float]]) -> tuple[Floats, Floats]:
    loaded = [(pair.load(), weight) for pair, weight in parts]
    b = np.concatenate([b * np.float32(weight) for (b, _), weight in loaded], axis=-1)
    return b, np.concatenate([a for (_, a), _ in loaded], axis=-2)


def shortened(pair: Pair, *, rank: int | None, max_error: float) -> Pair:
    """A pair of fewer ranks; as it is, where it has no more than `rank`.

    What it leaves out comes on top of what the pair left out already, at worst.
    """
    if rank is not None and pair.rank <= rank:
        return pair
    b, a = pair.load()
    if not (np.isfinite(b).all() and np.isfinite(a).all()):
        return pair  # which is refused by name
    stack = b.shape[:-2]
    found = [
        shorten(one_b, one_a, rank=rank, max_error=max_error)
        for one_b, one_a in zip(b.reshape(-1, *b.shape[-2:]), a.reshape(-1, *a.shape[-2:]), strict=True)
    ]
    kept = max(each.rank for each in found)
    new_b = np.stack([_padded(each.b, kept, axis=1) for each in found]).reshape(*stack, -1, kept)
    new_a = np.stack([_padded(each.a, kept, axis=0) for each in found]).reshape(*stack, kept, -1)
    before, cut = sqrt(pair.residual_energy), sqrt(max(each.residual_energy for each in found))
    residual = (before + cut * (1.0 + before)) ** 2  # |B @ A| is at most 1 + before of the change
    return replace(pair, rank=kept, load=lambda: (new_b, new_a), residual_energy=residual)


def _padded(matrix: Floats, rank: int, axis: int) -> Floats:
    missing = rank - matrix.shape[axis]
    return np.pad(matrix, [(0, missing if axis == dimension else 0) for dimension in range(2)])
