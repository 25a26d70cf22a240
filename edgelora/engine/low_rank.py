"""An adapter's weights in memory, as the mixing kernels read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.reader import GGUFHeader
from edgelora.engine.kernels import TILE
from edgelora.engine.preflight import pairs_of

F32, F16, BF16 = 0, 1, 30
_DTYPES: Mapping[str, tuple[int, type[np.generic]]] = {
    "F32": (F32, np.float32),
    "F16": (F16, np.uint16),
    "BF16": (BF16, np.uint16),
}
"""GGUF type to its number in `enum ggml_type`, and what numpy holds its bits in."""
MAX_NAME = 63 - len(".lora_a")  # of a matrix: ggml keeps 63 bytes of its socket's name

Bits = npt.NDArray[Any]


@dataclass(frozen=True)
class LowRank:
    """What an adapter has for one matrix, in the bits of its file.

    Attributes:
        a: (rank, n_in).
        b: (n_out / TILE, rank, TILE): tiles of columns, the last one padded with zeros.
        type: in `enum ggml_type`.
        factor: what llama.cpp multiplies a scale with: alpha / rank where the file has an alpha (llama-adapter.h).
    """

    a: Bits
    b: Bits
    type: int
    factor: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


class Weights:
    """An adapter's weights as the kernels read them.

    Attributes:
        pairs: matrix to A and B.
        width: the largest rank.
    """

    def __init__(self, pairs: Mapping[str, LowRank]) -> None:
        self.pairs = pairs
        self.width = max(pair.rank for pair in pairs.values())
        self.size_bytes = sum(pair.a.nbytes + pair.b.nbytes for pair in pairs.values())
        self.native: Any = None  # an array of kernels.Pair, by the mixer that knows the order of the matrices


def problem_of(adapter: GGUFHeader) -> str:
    """Why an adapter cannot be mixed with others; empty if it can."""
    for target, (a, b) in pairs_of(adapter).items():
        if a is None or b is None or len(a.shape) != 2 or target == "token_embd.weight":
            return f"it changes {target}, where rows cannot have adapters of their own"
        if a.type_name not in _DTYPES or b.type_name != a.type_name:
            return f"{target}: A has type {a.type_name} and B {b.type_name}, expected both {' or '.join(_DTYPES)}"
        if len(target.encode()) > MAX_NAME:
            return f"the name {target} is too long"
    return ""


def read_weights(adapter: GGUFHeader, data: bytes | memoryview) -> Weights:
    """The weights in a whole adapter file that was checked (`preflight.check_adapter`, `problem_of`).

    Args:
        data: the file's bytes; nothing of them is kept.
    """
    pairs = dict[str, LowRank]()
    alpha = float(adapter.metadata.get("adapter.lora.alpha", 0.0))
    for target, (a, b) in pairs_of(adapter).items():
        assert a is not None
        assert b is not None
        number, dtype = _DTYPES[a.type_name]
        down, up = (
            np.frombuffer(data, dtype, count=tensor.shape[0] * tensor.shape[1], offset=tensor.offset).reshape(
                tensor.shape
            )
            for tensor in (a, b)
        )
        pairs[target] = LowRank(down.copy(), tiled(up), number, alpha / a.shape[0] if alpha else 1.0)
    return Weights(pairs)


def tiled(b: Bits) -> Bits:
    """(n_out, rank) to (n_out / TILE, rank, TILE), C-contiguous."""
    n_out, rank = b.shape
    if n_out % TILE:
        b = np.concatenate([b, np.zeros((-n_out % TILE, rank), b.dtype)])
    return np.ascontiguousarray(b.reshape(-1, TILE, rank).transpose(0, 2, 1))


def untiled(b: Bits, n_out: int) -> Bits:
    """(n_out / TILE, rank, TILE) to (n_out, rank)."""
    return b.transpose(0, 2, 1).reshape(-1, b.shape[1])[:n_out]


def widened(bits: Bits, type: int) -> npt.NDArray[np.float32]:
    """Values of a `LowRank`'s type as float32, exactly."""
    if type == F16:
        return bits.view(np.float16).astype(np.float32)
    return bits if type == F32 else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
