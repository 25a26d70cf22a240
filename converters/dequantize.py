"""Rows of blocks to rows of float32, bit for bit as llama.cpp reads them.

F16 and BF16 are numpy casts, exact as they are. Everything else is the `to_float` of llama.cpp's own table of types
(`ggml_get_type_traits`, ggml/src/ggml.c), as `llama_tensor_dequantize_impl` (src/llama-quant.cpp) uses it: what is
quantized again from these values has the bytes that llama-quantize makes with `--allow-requantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from converters.block_types import BlockType
from converters.errors import FormatError, UnsupportedError
from converters.ggml_base import traits
from converters.quantize import Bytes, Floats


def dequantize_rows(blocks: Bytes, block_type: BlockType, n_cols: int) -> Floats:
    """Decode rows.

    Args:
        blocks: uint8, shape (n_rows, bytes of a row).
        block_type: a row of `block_types.TYPES`.
        n_cols: values in a row, a multiple of the type's block.

    Returns:
        float32, shape (n_rows, n_cols); of F32 it is a view of `blocks`.

    Raises:
        FormatError: rows that do not have the bytes of `n_cols` values.
        UnsupportedError: the type holds no weights (integers, float64), or llama-cpp-python's library is not there.
    """
    if n_cols % block_type.block or blocks.ndim != 2 or blocks.shape[1] != block_type.row_bytes(n_cols):
        raise FormatError(f"{blocks.shape} bytes are not rows of {n_cols} values in {block_type.name}")
    blocks = np.ascontiguousarray(blocks, np.uint8)
    cast = _CASTS.get(block_type.name)
    if cast is not None:
        return cast(blocks)
    found = traits(block_type)
    if not (found.is_quantized and found.to_float):
        raise UnsupportedError(f"llama.cpp cannot read {block_type.name} as float32", hint="Is this tensor a weight?")
    out = np.empty((blocks.shape[0], n_cols), np.float32)
    found.to_float(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def _from_f32(blocks: Bytes) -> Floats:
    return blocks.view(np.float32)


def _from_f16(blocks: Bytes) -> Floats:
    return blocks.view(np.float16).astype(np.float32)


def _from_bf16(blocks: Bytes) -> Floats:
    return (blocks.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


_CASTS: Mapping[str, Callable[[Bytes], Floats]] = {"F32": _from_f32, "F16": _from_f16, "BF16": _from_bf16}
