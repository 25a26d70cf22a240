"""Rows on which a wrong kernel shows, encoded twice: by the kernel and by llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from converters.block_types import BlockType

if TYPE_CHECKING:
    from converters.native import Quantizer

Floats = npt.NDArray[np.float32]
N_COLS = 768  # an odd number of super-blocks
N_NORMAL = 48
"""Rows of weights as models have them: 48 x 768 values take llama.cpp 1 to 8 ms, and one float operation done otherwise
(a fused multiply-add, say) changes some of their blocks in every type."""


def holds(encode: Quantizer, block_type: BlockType, ggml: ctypes.CDLL) -> bool:
    """Whether `encode` makes llama.cpp's bytes, without and with an importance matrix."""
    rows, importance = nasty_rows(), importances()
    return all(_bytes_equal(encode, block_type, ggml, rows, weights) for weights in (None, importance))


def _bytes_equal(
    encode: Quantizer, block_type: BlockType, ggml: ctypes.CDLL, rows: Floats, importance: Floats | None
) -> bool:
    ours = np.zeros((len(rows), block_type.row_bytes(N_COLS)), np.uint8)
    theirs = np.zeros_like(ours)
    weights = None if importance is None else importance.ctypes.data
    encode(rows.ctypes.data, ours.ctypes.data, len(rows), N_COLS, weights)
    ggml.ggml_quantize_chunk(block_type.number, rows.ctypes.data, theirs.ctypes.data, 0, len(rows), N_COLS, weights)
    return ours.tobytes() == theirs.tobytes()


@lru_cache
def nasty_rows() -> Floats:
    """float32, shape (n, 768)."""
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(np.stack([*_normal_rows(), *_odd_rows()]), np.float32)


@lru_cache
def importances() -> Floats:
    """float32, shape (768,): a few columns matter much, most little, some not at all."""
    values = np.random.default_rng(7).random(N_COLS, np.float32) ** np.float32(4)
    values[::37] = 0
    return values


def _normal_rows() -> Iterator[Floats]:
    random = np.random.default_rng(0)
    for index in range(N_NORMAL):
        row = random.standard_normal(N_COLS, np.float32) * np.float32(0.02)
        yield random.standard_t(3, N_COLS).astype(np.float32) * np.float32(0.02) if index % 4 == 3 else row


def _odd_rows() -> Iterator[Floats]:
    random = np.random.default_rng(1)
    normal, counting = random.standard_normal(N_COLS, np.float32), np.arange(N_COLS, dtype=np.float32)
    for constant in (0.0, -0.0, 0.01, -0.01):
        yield np.full(N_COLS, constant, np.float32)
    yield np.where(counting % 64 == 5, normal, np.float32(0))
    yield np.where(counting // 32 % 2 == 0, normal, np.float32(0))
    yield np.where(counting == 300, np.float32(1000), normal)
    yield np.abs(normal)
    yield -np.abs(normal)
    yield np.sign(normal) * np.float32(0.5)
    yield np.repeat(normal[::32], 32) + normal * np.float32(1e-5)
    yield normal * np.power(np.float32(10), counting // 16 - np.float32(20), dtype=np.float32)
    yield normal * np.float32(1e-38)
    yield normal * np.float32(1e-41)
    yield normal * np.float32(1e30)
    yield counting - np.float32(256)
    yield (np.round(normal * 8) / 8).astype(np.float32)
    # With a largest value of 127/64, steps of Q8_0 are 1/64: these lie half way between two, and just below.
    halves = (counting % 32 * 8 + np.float32(0.5) - np.float32(128)) / np.float32(64)
    halves[::32] = np.float32(127 / 64)
    yield np.clip(halves, -1.984375, 1.984375)
    just_below = np.where(counting % 32 == 0, np.float32(127 / 64), np.nextafter(np.float32(0.5), np.float32(0)) / 64)
    yield just_below * np.where(counting % 2 == 0, np.float32(1), np.float32(-1))
    # Half way between two 16-bit floats, and between two levels of IQ4 where the largest value is -127.
    yield np.float32(1) + (counting + np.float32(0.5)) * np.float32(2**-10)
    yield np.float32(1) + (counting + np.float32(0.5)) * np.float32(2**-7)
    yield np.where(counting % 32 == 0, np.float32(-127), np.float32(-74.5) + counting % 32 * np.float32(6.5))
    for strange in (np.inf, -np.inf, np.nan):
        yield np.where(counting == 100, np.float32(strange), normal)
