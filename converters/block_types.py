"""How one tensor can be stored: the block types of GGUF files and what each takes. Stdlib only.

A type is blocks of values: `Q4_K` is 256 values in 144 bytes. Sizes: `ggml_type_traits` in ggml/src/ggml.c and the
structs of ggml/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from converters.errors import UnsupportedError


@dataclass(frozen=True)
class BlockType:
    """One `ggml_type` (ggml/include/ggml.h).

    Attributes:
        number: its value in a GGUF file.
        block: values in a block.
        size: bytes in a block.
    """

    name: str
    number: int
    block: int
    size: int

    @property
    def can_be_made(self) -> bool:
        """Tensors can be quantized to it."""
        return self.name not in _READ_ONLY

    def row_bytes(self, n_cols: int) -> int:
        return n_cols // self.block * self.size

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor with `shape` in numpy order: the last dimension is the one in blocks."""
        return prod(shape[:-1]) * self.row_bytes(shape[-1]) if shape else self.size


_ROWS = (
    ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40), ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136),
    ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8), ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18), ("Q2_0", 42, 64, 18),
)  # fmt: skip
TYPES: Mapping[str, BlockType] = {row[0]: BlockType(*row) for row in _ROWS}
TYPE_BY_NUMBER: Mapping[int, BlockType] = {block_type.number: block_type for block_type in TYPES.values()}

PLAIN = ("F32", "F16", "BF16")
# What libggml only reads, or uses in between: nothing can be quantized to it (`ggml_quantize_chunk`, ggml/src/ggml.c).
_READ_ONLY = frozenset(("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"))


def find_type(name: str) -> BlockType:
    """The type called `name`, in any case, if tensors can be quantized to it.

    Raises:
        UnsupportedError: no such type, or llama.cpp cannot make it; the hint lists those it can.
    """
    found = TYPES.get(name.upper())
    if found is None or not found.can_be_made:
        why = f"unknown tensor type {name!r}" if found is None else f"llama.cpp cannot quantize to {found.name}"
        known = ", ".join(kind.lower() for kind in TYPES if kind not in _READ_ONLY)
        raise UnsupportedError(why, hint=f"Known: {known}.")
    return found
