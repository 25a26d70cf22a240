"""Rows of float32 to rows of blocks, byte for byte as llama.cpp makes them.

F32 is what it is. Everything else is llama.cpp's own `ggml_quantize_chunk` (ggml/src/ggml.c), called in the
`libggml-base` that llama-cpp-python installs, or a kernel that is proven to make its bytes (`converters.native`); F16
and BF16 are numpy casts where that library is not installed. llama.cpp's quantizers end the process where they meet
what they do not expect: all of that is refused here first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from converters import native
from converters.block_types import BlockType
from converters.errors import UnsupportedError
from converters.ggml_base import encoder, is_installed
from converters.quant_types import ABORTS_WITHOUT_IMATRIX

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# These look a point up in a grid, and abort where there is none: values that are not finite, or so large that their
# squares overflow (`iq2_find_best_neighbour` and its kin, ggml/src/ggml-quants.c).
ON_A_GRID = frozenset(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"))
_LARGEST_ON_A_GRID = 1e9


def quantize_rows(rows: Floats, block_type: BlockType, importance: Floats | None = None) -> Bytes:
    """Encode rows.

    Rows do not look at one another: chunks of a tensor give the bytes of the whole.

    Args:
        rows: float32, shape (n_rows, n_cols), n_cols a multiple of the type's block. From F16 or BF16 they are
            turned to float32 first, which loses nothing: llama-quantize does the same.
        block_type: a row of `block_types.TYPES`.
        importance: float32, shape (n_cols,): a row of an importance matrix, finite and not negative. F32, F16, BF16,
            Q8_0 and MXFP4 do not look at it. Experts have a row each, so theirs are encoded one by one.

    Returns:
        uint8, shape (n_rows, bytes of a row).

    Raises:
        UnsupportedError: llama-cpp-python's library is not there, or cannot make this type, or not from these values,
            or not without importance.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    cast = _CASTS.get(block_type.name)
    if cast is not None and not _has_kernel(block_type):
        return cast(rows).view(np.uint8).reshape(rows.shape[0], -1)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    _check(rows, block_type, weights)
    out = np.empty((rows.shape[0], block_type.row_bytes(rows.shape[1])), np.uint8)
    library = encoder(block_type.number)
    if kernel := native.quantizer(block_type, library):
        kernel(rows.ctypes.data, out.ctypes.data, rows.shape[0], rows.shape[1], _address(weights))
        return out
    written = library.ggml_quantize_chunk(
        block_type.number, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, _address(weights)
    )
    if written != out.nbytes:
        raise UnsupportedError(f"llama.cpp wrote {written} bytes of {block_type.name}, expected {out.nbytes}")
    return out


def _check(rows: Floats, block_type: BlockType, importance: Floats | None) -> None:
    if not block_type.can_be_made:
        raise UnsupportedError(f"llama.cpp cannot quantize to {block_type.name}", hint="Choose another type.")
    if rows.shape[1] % block_type.block:
        raise UnsupportedError(f"rows of {rows.shape[1]} do not fill {block_type.name}'s blocks of {block_type.block}")
    if importance is None:
        if block_type.name in ABORTS_WITHOUT_IMATRIX:
            raise UnsupportedError(
                f"{block_type.name} has too few bits to do without an importance matrix",
                hint="Give one with --imatrix, or make one with --calibrate TEXT.",
            )
    elif importance.shape != rows.shape[1:]:
        raise UnsupportedError(f"importance has shape {importance.shape}, rows have {rows.shape[1]} values")
    elif not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise UnsupportedError(
            "the importance matrix has values that are negative or not finite", hint="Compute it again."
        )
    if block_type.name in ON_A_GRID and rows.size and not _fits_a_grid(rows):
        raise UnsupportedError(
            f"{block_type.name} cannot hold values that are not finite, or beyond {_LARGEST_ON_A_GRID:.0e}",
            hint="Choose a type of the Q family for this tensor; the model itself looks damaged.",
        )


def _fits_a_grid(rows: Floats) -> bool:
    # A NaN makes both extremes NaN, and every comparison false.
    return bool(rows.min() >= -_LARGEST_ON_A_GRID and rows.max() <= _LARGEST_ON_A_GRID)


def _has_kernel(block_type: BlockType) -> bool:
    """Whether the library and a proven kernel are there."""
    if block_type.name == "F32" or not is_installed():
        return False
    return native.quantizer(block_type, encoder(block_type.number)) is not None


def _address(values: Floats | None) -> int | None:
    return None if values is None else int(values.ctypes.data)


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
