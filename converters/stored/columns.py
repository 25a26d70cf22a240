"""GPTQ and AWQ: the transpose of a weight in packed integers, a scale and a zero for each group of its columns.

A row of the weight is a column here, so rows are read as narrow strips of all the words. `(number - zero) * scale` in
float32. GPTQ packs down the columns, and in its first version stores zeros less one (`dequant_gptq` in `dequant_model`,
conversion/base.py). AWQ packs along the rows, eight columns in an order of its own (`reverse_awq_order` and
`dequantize_gemm`, https://github.com/casper-hansen/AutoAWQ/blob/main/awq/utils/packing_utils.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from converters.safetensors_file import StoredTensor
from converters.shards import Floats, Shards, floats
from converters.stored.tensor import Dequantized, group_indices, unpacked

STRIP_BYTES = 4 << 20  # of float32 columns at a time


@dataclass(frozen=True)
class PackedColumns(Dequantized):
    """Columns of integers; `shape` is (outputs, inputs).

    Attributes:
        words: I32, the weight.
        zeros: I32 (groups, outputs / numbers in a word).
        scales: (groups, outputs).
        group_of: I32 (inputs,), or None where groups are neighbours.
        group: inputs in a group.
        zero_offset: added to every zero.
    """

    words: StoredTensor
    zeros: StoredTensor
    scales: StoredTensor
    group_of: StoredTensor | None
    bits: int
    group: int
    zero_offset: int = 0

    order: ClassVar[tuple[int, ...]] = ()

    def rows(self, shards: Shards, start: int, stop: int) -> Floats:
        inputs, groups = self.shape[1], self.scales.shape[0]
        group_of = self._group_of(shards, inputs)
        zeros = self._across(shards, self.zeros, (0, groups), (start, stop)).astype(np.float32)
        zeros += np.float32(self.zero_offset)
        scales = floats(shards.block(self.scales, (0, groups), (start, stop)), self.scales.dtype)
        out = np.empty((stop - start, inputs), np.float32)
        for first, last in self._strips(inputs, stop - start):
            values = self._numbers(shards, (first, last), (start, stop)).astype(np.float32)
            values -= zeros[group_of[first:last]]
            values *= scales[group_of[first:last]]
            out[:, first:last] = values.T
        return out

    @abstractmethod
    def _numbers(self, shards: Shards, inputs: tuple[int, int], outputs: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """The integers of some inputs (from and to whole words) and outputs, (inputs, outputs)."""

    def _across(
        self, shards: Shards, tensor: StoredTensor, rows: tuple[int, int], outputs: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        """Some outputs of rows whose words hold neighbours, whether or not they begin a word."""
        per_word, (start, stop) = 32 // self.bits, outputs
        first = start // per_word
        words = shards.block(tensor, rows, (first, -(-stop // per_word)))
        return unpacked(words, self.bits, axis=1, order=self.order)[:, start - first * per_word :][:, : stop - start]

    def _group_of(self, shards: Shards, inputs: int) -> npt.NDArray[np.int64]:
        if self.group_of is None:
            return np.arange(inputs) // self.group
        return group_indices(self.group_of, shards.rows(self.group_of), self.scales.shape[0])

    def _strips(self, inputs: int, outputs: int) -> Iterator[tuple[int, int]]:
        step = max(32, STRIP_BYTES // (4 * outputs) // 32 * 32)
        return ((first, min(inputs, first + step)) for first in range(0, inputs, step))


class GPTQ(PackedColumns):
    def _numbers(self, shards: Shards, inputs: tuple[int, int], outputs: tuple[int, int]) -> npt.NDArray[np.uint8]:
        per_word = 32 // self.bits
        words = shards.block(self.words, (inputs[0] // per_word, inputs[1] // per_word), outputs)
        return unpacked(words, self.bits, axis=0)


class AWQ(PackedColumns):
    order = (0, 4, 1, 5, 2, 6, 3, 7)

    def _numbers(self, shards: Shards, inputs: tuple[int, int], outputs: tuple[int, int]) -> npt.NDArray[np.uint8]:
        return self._across(shards, self.words, inputs, outputs)
