"""Quantization several times faster than llama.cpp's, with its bytes, where this machine can build and prove it.

`kquants.c` and its headers are compiled at first use for the processor at hand and kept in the user's cache (`build`).
In each process, before a type is first used, its kernel and `ggml_quantize_chunk` encode the same nasty rows (`proof`);
a type whose bytes differ is left to llama.cpp, as is everything where there is no compiler. `EDGELORA_NATIVE=0` turns
all of it off.
Either way the bytes are llama.cpp's, so nothing is said about which of the two made them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

from converters.block_types import PLAIN, TYPES, BlockType
from converters.native import build, proof

Quantizer = Callable[[int, int, int, int, int | None], None]
"""(address of the rows, address of the output, n_rows, n_cols, address of n_cols importances or None)."""

CANARY = TYPES["Q5_K"]
"""The type on which other arithmetic shows at once: where llama.cpp was compiled with fused multiply-adds, one block of
Q5_K in four differs, but one of Q3_K in 4,000. No type is trusted unless this one is equal, too; but for those that
only round each value."""

_FIRST_USE = threading.Lock()
_known: dict[int, Quantizer | None] = {}


def quantizer(block_type: BlockType, ggml: ctypes.CDLL) -> Quantizer | None:
    """The fast encoder of one type. It may be called from several threads: it lets go of the interpreter lock.

    Args:
        block_type: of the output.
        ggml: `libggml-base`, ready to quantize this type; it is what the kernel has to equal, and encodes the blocks
            that the kernel leaves alone (not finite, huge, vanishing).

    Returns:
        A function that encodes C-contiguous float32 rows, n_cols a multiple of `block_type.block`. None: use `ggml`.
    """
    with _FIRST_USE:
        if block_type.number not in _known:
            _known[block_type.number] = _proven(block_type, ggml)
        return _known[block_type.number]


def _proven(block_type: BlockType, ggml: ctypes.CDLL) -> Quantizer | None:
    if os.environ.get("EDGELORA_NATIVE") == "0":
        return None
    library = build.library()
    if library is None:
        return None
    for each in [block_type] if block_type.name in PLAIN else [CANARY, block_type]:
        encode = bind(library, each, ggml)
        if not encode or not proof.holds(encode, each, ggml):
            return None
    return encode


def bind(library: ctypes.CDLL, block_type: BlockType, ggml: ctypes.CDLL) -> Quantizer | None:
    """The encoder of one type in a built library, unproven; None for a type that has no kernel."""
    kernel, chunk = library.kquants_quantize, ctypes.cast(ggml.ggml_quantize_chunk, ctypes.c_void_p)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    kernel.argtypes, kernel.restype = [ctypes.c_int, pointer, pointer, count, count, pointer, pointer], count
    number = block_type.number
    if kernel(number, None, None, 0, block_type.block, None, chunk) < 0:
        return None

    def encode(rows: int, out: int, n_rows: int, n_cols: int, importance: int | None) -> None:
        kernel(number, rows, out, n_rows, n_cols, importance, chunk)

    return encode
