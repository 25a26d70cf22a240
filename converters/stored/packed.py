"""compressed-tensors' `pack-quantized`: small integers in the words of a row, a scale and a zero for each group of it.

`(number - zero) * scale` in float32 (`dequant_packed` in `dequant_model`, conversion/base.py). Zeros are packed down
the columns; without any, numbers are counted from the middle of their range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from converters.safetensors_file import StoredTensor
from converters.shards import Floats, Shards, floats
from converters.stored.tensor import Dequantized, each_block, group_indices, unpacked


@dataclass(frozen=True)
class Packed(Dequantized):
    """Rows of integers.

    Attributes:
        packed: I32 (rows, words).
        scale: (rows, groups).
        zero: I32 (words, groups), packed along the rows, or None.
        group_of: I32 (columns,), where groups are not neighbours.
        group: columns in a group.
    """

    packed: StoredTensor
    scale: StoredTensor
    zero: StoredTensor | None
    group_of: StoredTensor | None
    bits: int
    group: int

    def rows(self, shards: Shards, start: int, stop: int) -> Floats:
        columns = self.shape[-1]
        values = unpacked(shards.rows(self.packed, start, stop), self.bits, axis=1)[:, :columns].astype(np.float32)
        zeros = self._zeros(shards, start, stop)
        scales = floats(shards.rows(self.scale, start, stop), self.scale.dtype)
        if self.group_of is None:
            each_block(np.subtract, values, zeros, self.group)
            each_block(np.multiply, values, scales, self.group)
            return values
        group_of = group_indices(self.group_of, shards.rows(self.group_of), self.scale.shape[-1])
        values -= zeros[:, group_of]
        values *= scales[:, group_of]
        return values

    def _zeros(self, shards: Shards, start: int, stop: int) -> Floats:
        if self.zero is None:
            return np.full((stop - start, self.scale.shape[-1]), 1 << (self.bits - 1), np.float32)
        per_word = 32 // self.bits
        first = start // per_word
        words = shards.rows(self.zero, first, -(-stop // per_word))
        return unpacked(words, self.bits, axis=0)[start - first * per_word :][: stop - start].astype(np.float32)
