"""Rows of float32 to rows of blocks, byte for byte as llama.cpp makes them.

F32, F16 and BF16 are numpy casts. Everything else is llama.cpp's own `ggml_quantize_chunk`, called in the
`libggml-base` that llama-cpp-python installs, without importing it. ctypes lets go of the interpreter lock, so threads
work side by side.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import UnsupportedError
from converters.quant_types import BlockType

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_FIRST_USE = threading.Lock()


def quantize_rows(rows: Floats, block_type: BlockType) -> Bytes:
    """Encode rows.

    Args:
        rows: float32, shape (n_rows, n_cols), n_cols a multiple of the type's block.
        block_type: a row of `quant_types.TYPES`.

    Returns:
        uint8, shape (n_rows, bytes of a row).

    Raises:
        UnsupportedError: llama-cpp-python's library is not there, or cannot make this type.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    cast = _CASTS.get(block_type.name)
    if cast is not None:
        return cast(rows).view(np.uint8).reshape(rows.shape[0], -1)
    out = np.empty((rows.shape[0], block_type.row_bytes(rows.shape[1])), np.uint8)
    library = _library(block_type.number)
    written = library.ggml_quantize_chunk(
        block_type.number, rows.ctypes.data, out.ctypes.data, 0, rows.shape[0], rows.shape[1], None
    )
    if written != out.nbytes:
        raise UnsupportedError(f"llama.cpp wrote {written} bytes of {block_type.name}, expected {out.nbytes}")
    return out


def _to_f32(rows: Floats) -> npt.NDArray[Any]:
    return rows


def _to_f16(rows: Floats) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        return rows.astype(np.float16)


def _to_bf16(rows: Floats) -> npt.NDArray[Any]:
    """Round to nearest, ties to even; NaN stays a (quiet) NaN (`ggml_compute_fp32_to_bf16`, ggml/src/ggml-impl.h)."""
    bits = rows.view(np.uint32)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    with np.errstate(over="ignore"):
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(is_nan, (bits >> np.uint32(16)) | np.uint32(64), rounded).astype(np.uint16)


_CASTS: Mapping[str, Callable[[Floats], npt.NDArray[Any]]] = {"F32": _to_f32, "F16": _to_f16, "BF16": _to_bf16}


@lru_cache
def _library(type_number: int) -> ctypes.CDLL:
    """`libggml-base`, with the tables of one type filled in; that must not happen in two threads at once."""
    with _FIRST_USE:
        library = ctypes.CDLL(str(_library_path()))
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
        library.ggml_quantize_init.argtypes = [ctypes.c_int]
        library.ggml_quantize_init(type_number)
        return library


def _library_path() -> Path:
    package = importlib.util.find_spec("llama_cpp")
    folders = [Path(folder) / "lib" for folder in (package.submodule_search_locations or [])] if package else []
    for folder in folders:
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            if (folder / name).is_file():
                return folder / name
    raise UnsupportedError(
        "llama-cpp-python is not installed, and its library makes the quantized types",
        hint="pip install llama-cpp-python, or convert to f32, f16 or bf16.",
    )
