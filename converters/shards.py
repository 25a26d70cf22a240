"""The bytes of safetensors files, as numbers: rows of a tensor, or some of their columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.open_files import OpenFiles
from converters.safetensors_file import StoredTensor

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
WIDE_SHARE = 4  # columns that are at least a quarter of their rows are cut out of whole rows


def _bfloat16(raw: Array) -> Floats:
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _looked_up(table: Floats) -> Callable[[Array], Floats]:
    return lambda raw: table[raw]


def _e4m3() -> Floats:
    """The 256 values of float8_e4m3fn: bias 7, no infinity, NaN where all bits but the sign are set."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7).astype(np.float64)
    size = np.ldexp(np.where(exponent > 0, 8 + mantissa, mantissa), np.maximum(exponent, 1) - 10)
    values = np.where(code & 0x7F == 0x7F, np.nan, size)
    return np.where(code & 0x80, -values, values).astype(np.float32)


def _e5m2() -> Floats:
    """The 256 values of float8_e5m2: the first byte of a float16."""
    return (np.arange(256, dtype=np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)


def _e8m0() -> Floats:
    """The 256 values of float8_e8m0fnu: powers of two, 255 is NaN."""
    values = np.ldexp(np.ones(256), np.arange(256) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


def _nearest(raw: Array) -> Floats:
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and is reported where weights are checked
        return raw.astype(np.float32, copy=False)


# How the bytes of each dtype lie, and how they become float32.
DTYPES: Mapping[str, tuple[np.dtype[Any], Callable[[Array], Floats]]] = {
    "F64": (np.dtype("<f8"), _nearest),
    "F32": (np.dtype("<f4"), _nearest),
    "F16": (np.dtype("<f2"), _nearest),
    "BF16": (np.dtype("<u2"), _bfloat16),
    "F8_E4M3": (np.dtype("u1"), _looked_up(_e4m3())),
    "F8_E5M2": (np.dtype("u1"), _looked_up(_e5m2())),
    "F8_E8M0": (np.dtype("u1"), _looked_up(_e8m0())),
    "I8": (np.dtype("i1"), _nearest),
    "U8": (np.dtype("u1"), _nearest),
    "I16": (np.dtype("<i2"), _nearest),
    "I32": (np.dtype("<i4"), _nearest),
    "I64": (np.dtype("<i8"), _nearest),
}


class Shards(OpenFiles):
    """Some open safetensors files."""

    def read(self, tensor: StoredTensor, start: int, count: int) -> bytes:
        """Bytes of a tensor, `start` counted from its own first one; raises as `bytes_of`."""
        return self.bytes_of(tensor.file, tensor.name, tensor.offset + start, count, hint="Download it again.")

    def numbers(self, tensor: StoredTensor, start: int, stop: int) -> Array:
        """Numbers `start` to `stop` of a tensor as they are stored; BF16 and F8 are their bits."""
        dtype = DTYPES[tensor.dtype][0]
        return np.frombuffer(self.read(tensor, start * dtype.itemsize, (stop - start) * dtype.itemsize), dtype)

    def rows(self, tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Array:
        """Rows as they are stored, shape (stop - start, row length); a vector is one row."""
        n_rows, n_cols = matrix_of(tensor.shape)
        stop = n_rows if stop is None else stop
        return self.numbers(tensor, start * n_cols, stop * n_cols).reshape(stop - start, n_cols)

    def block(self, tensor: StoredTensor, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
        """Some columns of some rows, as they are stored."""
        n_cols, (first, last), (start, stop) = matrix_of(tensor.shape)[1], rows, columns
        if (stop - start) * WIDE_SHARE >= n_cols:
            return self.rows(tensor, first, last)[:, start:stop]
        dtype = DTYPES[tensor.dtype][0]
        size = (stop - start) * dtype.itemsize
        pieces = [self.read(tensor, (row * n_cols + start) * dtype.itemsize, size) for row in range(first, last)]
        return np.frombuffer(b"".join(pieces), dtype).reshape(last - first, stop - start)


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor, its leading dimensions taken together; a vector is one row."""
    return prod(shape[:-1]), shape[-1] if shape else 1


def floats(raw: Array, dtype: str) -> Floats:
    """Stored numbers of a dtype of `DTYPES` as float32; exact but for F64 and I32 and wider, which are rounded."""
    return DTYPES[dtype][1](raw)
