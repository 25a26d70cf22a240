"""An adapter's changes as edits of a base's GGUF tensors, row by row as they stream by.

Low-rank changes add a product of their own rows. Another function of the weight is applied to the rows that stream by
where they lie in the order of transformers, and to the whole matrix otherwise, which is then kept until its rows are
through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np

from converters.adapted_base import AdaptedBase
from converters.base import can_untie
from converters.checkpoint import Floats
from converters.compile import is_base_copy, is_embedding, is_output, misfit, rows_first, weight_of
from converters.methods import Change, LowRank, Reading, Replaced, Shifted, Transformed
from converters.pairs import Pair, Piece, assemble
from converters.placement import Slot, find_slots, is_known, oriented, source_shape

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
Edit = Callable[[Floats, int], Floats]
"""Rows of a GGUF tensor as float32 (n, columns) and the number of the first to the changed rows."""


@dataclass
class Edits:
    """What happens to a base.

    Attributes:
        by_tensor: GGUF name to its edits, in order.
        added: GGUF name to the shape of tensors that the base has not (biases); they begin as zeros.
        tied: those of the embeddings that a tied output has too.
        unties: the output becomes a tensor of its own: the embeddings change, or it does, and not both alike.
        problems: what cannot be merged.
    """

    by_tensor: dict[str, list[Edit]] = field(default_factory=dict)
    added: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tied: list[Edit] = field(default_factory=list)
    unties: bool = False
    problems: list[str] = field(default_factory=list)

    def apply(self, name: str, rows: Floats, start: int) -> Floats:
        for edit in self.by_tensor.get(name, ()):
            rows = edit(rows, start)
        return rows


def edits_of(reading: Reading, base: AdaptedBase, scale: float = 1.0) -> Edits:
    """Every change of an adapter.

    Args:
        scale: of the whole adapter: W + scale * (changed W - W).
    """
    edits = Edits(problems=[*reading.problems, *reading.not_merged])
    pieces: dict[str, list[Piece]] = {}
    for change in reading.changes:
        if isinstance(change, Replaced) and is_base_copy(base, change):
            continue
        change = oriented(base, change) if isinstance(change, LowRank) else change
        for slot in _slots(edits, base, change):
            _edit(edits, base, change, slot, pieces, scale)
    if edits.unties:  # what the two had in common before
        edits.by_tensor[OUTPUT] = [*edits.tied, *edits.by_tensor.get(OUTPUT, ())]
    for name, of_tensor in pieces.items():
        shape = base.shapes[EMBEDDING] if name == OUTPUT and base.is_tied else base.shapes[name]
        edits.by_tensor.setdefault(name, []).append(_Sum(assemble(name, shape, of_tensor), scale))
    return edits


def _edit(
    edits: Edits, base: AdaptedBase, change: Change, slot: Slot, pieces: dict[str, list[Piece]], scale: float
) -> None:
    if isinstance(change, LowRank):
        pieces.setdefault(slot.gguf, []).append(Piece(change, slot))
        return
    edit: Edit
    if isinstance(change, Transformed):
        edit = _transformation(base, change, slot)
    elif isinstance(change, Replaced):
        edit = _Replacement(partial(_replacement, change, slot), slot, _row_count(base, slot))
    else:
        edit = partial(_shift, change, slot)
    edit = edit if scale == 1.0 else _scaled(edit, scale)
    edits.by_tensor.setdefault(slot.gguf, []).append(edit)
    if base.is_tied and slot.gguf == EMBEDDING and _keeps_tie(change):
        edits.tied.append(edit)


def _slots(edits: Edits, base: AdaptedBase, change: Change) -> list[Slot]:
    """Where a change goes; a tied output, and biases that the base has not, are made."""
    slots = find_slots(base, change.tensor)
    if base.is_tied and _keeps_tie(change) and not is_embedding(base, change.tensor):
        return []  # of the output, which follows the embeddings
    if base.is_tied and is_embedding(base, change.tensor) and not _keeps_tie(change):
        edits.unties = True
    there = [slot for slot in slots if slot.gguf in base.shapes]
    if base.is_tied and is_output(base, change.tensor):
        edits.unties, there = True, slots
    elif slots and not there and change.tensor.endswith(".bias"):
        if isinstance(change, Transformed) and change.if_there:
            return []
        there = slots
        edits.added |= {slot.gguf: (_outputs(base, slot),) for slot in slots}
    if not there:
        if isinstance(change, Transformed) and change.if_there:
            return []
        edits.problems.append(f"{change.tensor}: {_absence(base, change.tensor)}")
        return []
    if edits.unties and not can_untie(base.family):
        what = "changes the embeddings or the output alone, and llama.cpp's"
        edits.problems.append(f"{change.tensor}: {what} {base.family.architecture} always takes one for both")
        return []
    if problem := misfit(base, change, there[0]):
        edits.problems.append(problem)
        return []
    return there


def _absence(base: AdaptedBase, tensor: str) -> str:
    architecture = base.family.architecture
    if is_known(base.family, tensor):
        return "the base has no such tensor"
    if tensor.endswith(".bias") and is_known(base.family, tensor.removesuffix("bias") + "weight"):
        return f"llama.cpp's {architecture} adds no bias there"
    return f"no tensor of a {architecture} model"


def _outputs(base: AdaptedBase, slot: Slot) -> int:
    """Values of a bias that the base has not: one for each row of the weight, of which a slot may be a part."""
    weight = base.shapes.get(slot.gguf.removesuffix("bias") + "weight", (len(slot.rows), 1))
    return prod(weight[:-1])


def _keeps_tie(change: Change) -> bool:
    return not isinstance(change, Shifted) and change.keeps_tie


class _Loaded:
    """Something that is loaded when the first rows of a tensor go by, and forgotten with the last."""

    def __init__(self, load: Callable[[], Any], rows: int) -> None:
        self._load, self._rows, self._left = load, rows, rows
        self._lock = threading.Lock()
        self._value: Any = None

    def __call__(self) -> Any:
        with self._lock:
            if self._value is None:
                self._value = self._load()
            return self._value

    def served(self, count: int) -> None:
        with self._lock:
            self._left -= count
            if self._left <= 0:
                self._value, self._left = None, self._rows


class _Sum:
    """rows + scale * B @ A, of a matrix or of a stack of them."""

    def __init__(self, pair: Pair, scale: float) -> None:
        self._rows, self._scale = pair.shape[-2], np.float32(scale)
        self._factors = _Loaded(partial(_stacked, pair), prod(pair.shape[:-1]))

    def __call__(self, rows: Floats, start: int) -> Floats:
        each, out, stop = self._rows, np.empty_like(rows), start + len(rows)
        b, a = self._factors()
        for matrix in range(start // each, -(-stop // each)):
            first, last = max(start, matrix * each), min(stop, (matrix + 1) * each)
            added = b[matrix, first - matrix * each : last - matrix * each] @ a[matrix]
            out[first - start : last - start] = rows[first - start : last - start] + self._scale * added
        self._factors.served(len(rows))
        return out


def _stacked(pair: Pair) -> tuple[Floats, Floats]:
    b, a = pair.load()
    return b.reshape(-1, *b.shape[-2:]), a.reshape(-1, *a.shape[-2:])


class _Replacement:
    """Rows of a tensor that are others; `load` gives them in the slot's order, (rows, columns) or (1, values)."""

    def __init__(self, load: Callable[[], Floats], slot: Slot, rows: int) -> None:
        self._values, self._slot = _Loaded(load, rows), slot

    def __call__(self, rows: Floats, start: int) -> Floats:
        new, out, where = self._values(), rows.copy(), self._slot.rows
        if len(new) == 1 and len(where) > 1:  # a vector is one row
            out[0, where] = new[0]
        else:
            inside = (where >= start) & (where < start + len(rows))
            out[where[inside] - start] = new[inside]
        self._values.served(len(rows))
        return out


def _transformation(base: AdaptedBase, change: Transformed, slot: Slot) -> Edit:
    is_matrix = len(source_shape(base, slot)) > 1
    in_order = slot.columns is None and all((np.diff(numbers) == 1).all() for numbers in (slot.source, slot.rows))
    if change.by_rows and in_order and is_matrix:
        return partial(_by_rows, change, slot)
    return _Replacement(lambda: _ordered(_whole(base, change), slot), slot, _row_count(base, slot))


def _row_count(base: AdaptedBase, slot: Slot) -> int:
    shape = base.shapes.get(slot.gguf, base.shapes[EMBEDDING] if slot.gguf == OUTPUT else (1,))
    return prod(shape[:-1])


def _by_rows(change: Transformed, slot: Slot, rows: Floats, start: int) -> Floats:
    first, last = int(slot.rows[0]), int(slot.rows[-1]) + 1
    low, high = max(start, first), min(start + len(rows), last)
    if low >= high:
        return rows
    out = rows.copy()
    number = int(slot.source[0]) + low - first
    out[low - start : high - start] = change.apply(rows[low - start : high - start], number)
    return out


def _whole(base: AdaptedBase, change: Transformed) -> Floats:
    weight = weight_of(base, change.tensor)
    changed = change.apply(weight.reshape(-1, weight.shape[-1]) if weight.ndim > 1 else weight[None], 0)
    return changed.reshape(weight.shape)


def _replacement(change: Replaced, slot: Slot) -> Floats:
    """A new tensor as the slot's rows."""
    return _ordered(rows_first(change.load(), slot), slot)


def _ordered(values: Floats, slot: Slot) -> Floats:
    """A transformers tensor as the rows of a slot: (rows, columns), or (1, values) of a vector."""
    value = slot.place.row.value
    if values.ndim == 1:
        changed = value.forward(values) if value and not slot.place.is_bias else values
        return changed[None] if slot.is_row else changed[slot.source][None]
    rows = values.reshape(-1, values.shape[-1])[slot.source]
    rows = rows if slot.columns is None else rows[:, slot.columns]
    return value.forward(rows) if value else rows


def _shift(change: Shifted, slot: Slot, rows: Floats, start: int) -> Floats:
    out = rows.copy()
    out[0, slot.rows] += change.load().reshape(-1)[slot.source]
    return out


def _scaled(edit: Edit, scale: float) -> Edit:
    def scaled(rows: Floats, start: int) -> Floats:
        return rows + np.float32(scale) * (edit(rows, start) - rows)

    return scaled


def pair_edits(pairs: Sequence[Pair], base: AdaptedBase, scale: float) -> Edits:
    """Those of a GGUF adapter, whose pairs are placed already."""
    edits = Edits()
    for pair in pairs:
        if pair.tensor not in base.shapes and not (pair.tensor == OUTPUT and base.is_tied):
            edits.problems.append(f"{pair.tensor}: the base has no such tensor")
            continue
        wanted = base.shapes[EMBEDDING if pair.tensor == OUTPUT and base.is_tied else pair.tensor]
        if pair.shape != wanted:
            edits.problems.append(f"{pair.tensor}: the adapter is for {pair.shape}, the base has {wanted}")
        edits.unties |= base.is_tied and pair.tensor in (EMBEDDING, OUTPUT)
        edits.by_tensor[pair.tensor] = [_Sum(pair, scale)]
    return edits


def edited_base(base: AdaptedBase, edits: Edits) -> AdaptedBase:
    """A base as it is after some edits: what the next adapter changes."""
    shapes = {**base.shapes, **edits.added}
    if edits.unties:
        shapes[OUTPUT] = base.shapes[EMBEDDING]

    def rows(name: str, start: int, stop: int) -> Floats:
        if name in edits.added:
            return edits.apply(name, np.zeros((1, edits.added[name][0]), np.float32), start)
        source = name if name in base.shapes else EMBEDDING
        return edits.apply(name, base.rows(source, start, stop), start)

    return replace(base, shapes=shapes, rows=rows)


def joined(several: Sequence[Edits]) -> Edits:
    """The edits of several adapters, one after another."""
    out = Edits()
    for edits in several:
        if edits.unties and not out.unties and EMBEDDING in out.by_tensor:  # the output was that until now
            out.by_tensor[OUTPUT] = [*out.by_tensor[EMBEDDING]]
        for name, of_tensor in edits.by_tensor.items():
            out.by_tensor.setdefault(name, []).extend(of_tensor)
        out.added |= edits.added
        out.unties |= edits.unties
        out.problems += edits.problems
    return out
