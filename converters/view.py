"""A GGUF tensor as rows of a checkpoint's tensors: reordered, cut out, stacked, transposed or shifted on the way.

Rows are read when they are asked for, so a stack of 128 experts takes no more memory than one matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from converters.architectures import Indices, Place, Sizes
from converters.checkpoint import Bytes, Floats, Tensors

ReadRange = Callable[[int, int], npt.NDArray[Any]]
STRIP_BYTES = 4 << 20  # of a transposed matrix at a time
WIDE_SPAN = 4  # rows that lie within so many times their number are read in one go
MXFP4_BLOCK = 32
_orders: WeakValueDictionary[bytes, Indices] = WeakValueDictionary()


@dataclass(frozen=True)
class View:
    """One tensor to be made.

    Attributes:
        names: the HF tensors, one after the other.
        shape: of the GGUF tensor, in numpy order.
    """

    tensors: Tensors
    names: tuple[str, ...]
    shape: tuple[int, ...]
    place: Place
    order: Indices | None
    columns: Indices | None

    @classmethod
    def of(cls, tensors: Tensors, place: Place, sizes: Sizes) -> View:
        names, shape = place.hf_names(sizes), place.shape(sizes)
        return cls(tensors, names, shape, place, _shared(place.row_order(sizes)), _shared(place.column_order(sizes)))

    @property
    def is_transposed(self) -> bool:
        return self.place.row.transposed and not self.place.is_bias

    def read(self, start: int, stop: int) -> Floats:
        """Rows `start` to `stop` as float32, shape (stop - start, row length); a vector is one row.

        Raises:
            ConversionError: see `Tensors.rows`.
        """
        rows = self._vector() if len(self.shape) == 1 else self._rows(start, stop)
        if self.columns is not None:
            rows = rows[:, self.columns]
        value = self.place.row.value
        if value is None or self.place.is_bias:
            return rows
        changed = value.forward(rows)
        if self.tensors.tensors[self.names[0]].dtype == "F16":  # llama.cpp's converter computes in the stored type
            return changed.astype(np.float16).astype(np.float32)
        return changed

    def read_all(self) -> Floats:
        return self.read(0, prod(self.shape[:-1]))

    def read_blocks(self, start: int, stop: int) -> Bytes:
        """Rows of an MXFP4 tensor as its blocks, uint8 (stop - start, bytes of a row).

        A block is an exponent and 16 bytes of codes. Checkpoints put value 2i into the low half of byte i, llama.cpp
        value i (`repack_mxfp4_blocks`, conversion/base.py).
        """
        name = self.names[0]
        codes = self._gathered(lambda lo, hi: self.tensors.raw_rows(name, lo, hi, self.shape[-1] // 2), start, stop)
        scales = self._gathered(
            lambda lo, hi: self.tensors.raw_rows(scales_of(name), lo, hi, self.shape[-1] // MXFP4_BLOCK), start, stop
        )
        halves = codes.reshape(len(codes), -1, MXFP4_BLOCK // 2)
        values = np.stack((halves & 0x0F, halves >> 4), axis=-1).reshape(len(codes), -1, MXFP4_BLOCK)
        packed = values[..., : MXFP4_BLOCK // 2] | (values[..., MXFP4_BLOCK // 2 :] << 4)
        return np.concatenate((scales[..., None], packed), axis=-1).reshape(len(codes), -1)

    def _vector(self) -> Floats:
        values = np.concatenate([self.tensors.rows(name).reshape(-1) for name in self.names])
        return (values if self.order is None else values[self.order]).reshape(1, -1)

    def _rows(self, start: int, stop: int) -> Floats:
        if self.is_transposed:
            picked = np.arange(start, stop) if self.order is None else self.order[start:stop]
            return self._transposed(picked)
        return self._gathered(self._range, start, stop)

    def _gathered(self, read: ReadRange, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows of this tensor by a function that reads a range of the stored ones."""
        if self.order is None:
            return read(start, stop)
        picked = self.order[start:stop]
        low, high = int(picked.min()), int(picked.max()) + 1
        if high - low <= WIDE_SPAN * len(picked):
            rows = read(low, high)
            return rows if high - low == len(picked) and np.all(np.diff(picked) == 1) else rows[picked - low]
        return np.concatenate([read(first, last) for first, last in _runs(picked)])

    def _range(self, start: int, stop: int) -> Floats:
        """Stored rows, counted through all the HF tensors."""
        each = self._rows_each()
        pieces = [self.tensors.rows(self.names[n], lo, hi) for n, lo, hi in _split(start, stop, each)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _rows_each(self) -> int:
        shape = self.tensors.tensors[self.names[0]].shape
        return prod(shape[:-1])

    def _transposed(self, picked: Indices) -> Floats:
        """Rows of the transposes of stacked matrices, each stored as (columns, rows)."""
        n_in, n_out = self.tensors.tensors[self.names[0]].shape[-2:]
        out = np.empty((len(picked), n_in), np.float32)
        matrices = picked // n_out
        for matrix in np.unique(matrices):
            where = np.flatnonzero(matrices == matrix)
            wanted = picked[where] - matrix * n_out
            step = max(1, STRIP_BYTES // (4 * n_out))
            for first in range(0, n_in, step):
                last = min(n_in, first + step)
                strip = self.tensors.rows(self.names[0], int(matrix) * n_in + first, int(matrix) * n_in + last)
                out[where, first:last] = strip[:, wanted].T
        return out


def _shared(order: Indices | None) -> Indices | None:
    """One array for all equal ones: those of 128 experts take megabytes each, and the layers of a model are alike."""
    if order is None:
        return None
    order = np.ascontiguousarray(order)
    return _orders.setdefault(hashlib.sha256(order.data).digest(), order)


def scales_of(blocks: str) -> str:
    """The tensor of exponents beside one of MXFP4 blocks."""
    return blocks.removesuffix("_blocks") + "_scales"


def _split(start: int, stop: int, each: int) -> Iterator[tuple[int, int, int]]:
    """(part, first row, last row) of a range that goes through parts of `each` rows."""
    while start < stop:
        part, row = divmod(start, each)
        last = min(each, row + stop - start)
        yield part, row, last
        start += last - row


def _runs(picked: Indices) -> Iterator[tuple[int, int]]:
    """Ranges of numbers that follow one another."""
    for run in np.split(picked, np.flatnonzero(np.diff(picked) != 1) + 1):
        yield int(run[0]), int(run[-1]) + 1
