"""Weights stored as 8-bit numbers with a scale for all of them, for each row, or for each block.

DeepSeek's and Qwen's FP8, vLLM's FP8, compressed-tensors' `float-quantized`, `int-quantized` and `naive-quantized`,
ModelOpt's FP8: `weight.float() * scale`, the scale repeated over its block (`dequant_simple` in `dequant_model`,
conversion/base.py). LLM.int8 of bitsandbytes: `weight * SCB / 127` (`int8_vectorwise_dequant`,
bitsandbytes/backends/default/ops.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from converters.safetensors_file import StoredTensor
from converters.shards import Floats, Shards, floats
from converters.stored.tensor import FLOATS, Dequantized, Problems, each_block

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALE = (*FLOATS, "F8_E8M0")
ONE_127TH = np.float32(1 / 127)


@dataclass(frozen=True)
class Scaled(Dequantized):
    """Numbers times scales.

    Attributes:
        grid: shape of the scales as (matrices, rows, columns); a 1 serves all.
        block: how many rows and columns of a weight each scale serves.
        zero: subtracted first, with the scales' grid; None where it is zero.
        is_int8: LLM.int8, whose scales are largest values.
    """

    weight: StoredTensor
    scale: StoredTensor
    grid: tuple[int, int, int]
    block: tuple[int, int]
    zero: StoredTensor | None = None
    is_int8: bool = False

    def rows(self, shards: Shards, start: int, stop: int) -> Floats:
        values = floats(shards.rows(self.weight, start, stop), self.weight.dtype)
        if self.zero is not None:
            each_block(np.subtract, values, self._served(shards, self.zero, start, stop), self.block[1])
        each_block(np.multiply, values, self._served(shards, self.scale, start, stop), self.block[1])
        if self.is_int8:
            values *= ONE_127TH
        return values

    def _served(self, shards: Shards, tensor: StoredTensor, start: int, stop: int) -> Floats:
        """The row of scales (or zeros) that serves each row of the weight, (rows, columns of the grid)."""
        matrices, n_rows, n_cols = self.grid
        row, rows_each = np.arange(start, stop), self.shape[-2]
        picked = row % rows_each // self.block[0] + (row // rows_each * n_rows if matrices > 1 else 0)
        low, high = int(picked.min()), int(picked.max()) + 1
        numbers = shards.numbers(tensor, low * n_cols, high * n_cols)
        served: Floats = floats(numbers, tensor.dtype).reshape(-1, n_cols)[picked - low]
        return served


def scaled(
    name: str,
    weight: StoredTensor,
    scale: StoredTensor,
    block: tuple[int, int] | None,
    problems: Problems,
    *,
    zero: StoredTensor | None = None,
    is_int8: bool = False,
) -> Scaled | None:
    """A weight of numbers and scales; None where they do not fit each other, which is noted.

    Args:
        block: rows and columns that a scale serves; None where the scales' shape says it (one, one a row).
    """
    rows, columns = weight.shape[-2:] if len(weight.shape) >= 2 else (0, 0)
    matrices = prod(weight.shape[:-2])
    shape = (*scale.shape, *(1,) * (len(weight.shape) - len(scale.shape)))
    if block is not None and prod(scale.shape) > 1:
        wanted = (*weight.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
        fits, grid, each = shape == wanted, (matrices, wanted[-2], wanted[-1]), block
    else:
        fits = len(shape) == len(weight.shape) and shape[-1] == 1 and shape[-2] in (1, rows)
        fits = fits and prod(shape[:-2]) in (1, matrices) and len(weight.shape) >= 2
        grid = (prod(shape[:-2]), shape[-2], 1) if fits else (1, 1, 1)
        each = (1 if grid[1] == rows else rows, columns)
    if not fits or 0 in weight.shape:
        problems.append(f"{scale.name}: shape {scale.shape} does not fit that of its weight, {weight.shape}")
        return None
    if zero is not None and not problems.shape(zero, scale.shape):
        return None
    return Scaled(name, "F32", weight.shape, weight.file, weight, scale, grid, each, zero, is_int8)
