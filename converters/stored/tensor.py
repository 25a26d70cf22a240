"""A weight that is computed, rows at a time, from the tensors that a quantization stored in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import FormatError
from converters.safetensors_file import StoredTensor
from converters.shards import Array, Floats, Shards

Settings = Mapping[str, Any]
Parts = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Dequantized(ABC):
    """A weight as a checkpoint's other tensors are: `name`, `shape`, `dtype`, and rows of float32.

    Attributes:
        dtype: whose values the rows have: "F32", or what the quantization's own code rounds to.
        shape: of the weight.
        file: where its numbers lie.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @abstractmethod
    def rows(self, shards: Shards, start: int, stop: int) -> Floats:
        """Rows `start` to `stop`, shape (stop - start, row length), in memory that grows with their number alone."""


@dataclass(frozen=True)
class Found:
    """What a method found in a checkpoint.

    Attributes:
        weights: by the name of the weight each stands for.
        used: stored tensors they are made of, and those that belong to the quantization and change no weight.
        what: the format in words, for the notice.
    """

    weights: Mapping[str, Dequantized]
    used: frozenset[str]
    what: str


class Problems(list[str]):
    """What is wrong with the tensors of one checkpoint, all of it reported together."""

    def part(self, tensors: Parts, name: str, dtypes: tuple[str, ...]) -> StoredTensor | None:
        """A tensor that has to be there, of one of these dtypes; else a problem is noted."""
        found = tensors.get(name)
        if found is None:
            self.append(f"{name}: is missing")
        elif found.dtype not in dtypes:
            self.append(f"{name}: is {found.dtype}, expected {' or '.join(dtypes)}")
            return None
        return found

    def shape(self, tensor: StoredTensor, *wanted: tuple[int, ...]) -> bool:
        """Whether a tensor has one of these shapes; else a problem is noted."""
        if tensor.shape in wanted:
            return True
        self.append(f"{tensor.name}: has shape {tensor.shape}, expected {' or '.join(map(str, wanted))}")
        return False


def unpacked(words: Array, bits: int, axis: int, order: tuple[int, ...] = ()) -> npt.NDArray[np.uint8]:
    """The numbers of up to 8 bits in 32-bit words, the lowest bits first, one after the other along `axis` (0 or 1).

    Args:
        words: int32, (rows, columns).
        order: which place in a word each number has, where it is not its own.
    """
    (rows, columns), per_word, whole = words.shape, 32 // bits, words.view(np.uint32)
    spread = np.empty((rows, per_word, columns) if axis == 0 else (rows, columns, per_word), np.uint8)
    places = np.moveaxis(spread, 1 if axis == 0 else 2, 0)
    for place, number in enumerate(order or range(per_word)):
        places[place] = (whole >> np.uint32(bits * number)) & np.uint32((1 << bits) - 1)
    return spread.reshape(-1, columns) if axis == 0 else spread.reshape(rows, -1)


def each_block(change: np.ufunc, values: Floats, grid: Floats, width: int) -> None:
    """Change every number in place by what its block has.

    Args:
        grid: (rows, blocks), each for `width` columns; the last may serve fewer.
    """
    (rows, columns), n_blocks = values.shape, grid.shape[1]
    if n_blocks * width == columns:
        blocks = values.reshape(rows, n_blocks, width)
        change(blocks, grid[:, :, None], out=blocks)
    else:
        change(values, np.repeat(grid, width, axis=1)[:, :columns], out=values)


def group_indices(tensor: StoredTensor, raw: Array, groups: int) -> npt.NDArray[np.int64]:
    """Which group each column of a weight belongs to, from a stored `g_idx`.

    Raises:
        FormatError: it names a group that is not there.
    """
    indices = raw.reshape(-1).astype(np.int64)
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < groups:
        raise FormatError(f"{tensor.file}: {tensor.name} names groups outside 0 to {groups - 1}")
    return indices


FLOATS = ("F32", "F16", "BF16", "F64")
