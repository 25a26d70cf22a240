"""Rows of a GGUF tensor as they stream by, changed.

Low-rank changes add a product of their own rows. Another function of the weight is applied to the rows that stream by
where they lie in the order of transformers, and to the whole matrix otherwise, which is then kept until its rows are
through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np

from converters.adapted_base import AdaptedBase
from converters.checkpoint import Floats
from converters.compile import rows_first, weight_of
from converters.methods import Replaced, Shifted, Transformed
from converters.pairs import Pair
from converters.placement import Slot, source_shape
from converters.tensor_kinds import EMBEDDING, OUTPUT

Edit = Callable[[Floats, int], Floats]
"""Rows of a GGUF tensor as float32 (n, columns) and the number of the first to the changed rows."""


def edit_of(base: AdaptedBase, change: Transformed | Replaced | Shifted, slot: Slot, slots: Sequence[Slot]) -> Edit:
    """The edit of one of the places of a change.

    Args:
        base: as it is when this change comes.
        slots: all of its places.
    """
    if isinstance(change, Transformed):
        return _transformation(base, change, slot, slots)
    if isinstance(change, Replaced):
        return _Replacement(partial(_replacement, change, slot), slot, _row_count(base, slot))
    return partial(_shift, change, slot)


def sum_of(pair: Pair, scale: float) -> Edit:
    return _Sum(pair, scale)


def scaled(edits: Sequence[Edit], scale: float) -> Edit:
    """A part of what several edits do, one after another: W + scale * (changed W - W)."""

    def apply(rows: Floats, start: int) -> Floats:
        changed = rows
        for edit in edits:
            changed = edit(changed, start)
        return rows + np.float32(scale) * (changed - rows)

    return apply


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


def _transformation(base: AdaptedBase, change: Transformed, slot: Slot, slots: Sequence[Slot]) -> Edit:
    is_matrix = len(source_shape(base, slot)) > 1
    in_order = slot.columns is None and all((np.diff(numbers) == 1).all() for numbers in (slot.source, slot.rows))
    if change.by_rows and in_order and is_matrix:
        return partial(_by_rows, change, slot)
    return _Replacement(lambda: _ordered(_whole(base, change, slots), slot), slot, _row_count(base, slot))


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


def _whole(base: AdaptedBase, change: Transformed, slots: Sequence[Slot]) -> Floats:
    weight = weight_of(base, change.tensor, slots)
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
