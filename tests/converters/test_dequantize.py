"""Blocks are read back as llama.cpp reads them, and as gguf's own independent decoder does."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from converters import ggml_base
from converters.block_types import TYPES, BlockType
from converters.dequantize import dequantize_rows
from converters.errors import FormatError, UnsupportedError
from converters.quantize import quantize_rows

# gguf's decoder does not know Q1_0 and Q2_0 yet.
READ_BY_GGUF = [kind for kind in TYPES.values() if kind.can_be_made and kind.name not in ("Q1_0", "Q2_0")]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def blocks_of(kind: BlockType) -> np.ndarray:
    """Random bytes without the bit that, where a byte is the upper one of a scale, could make it infinite or NaN."""
    blocks = np.random.default_rng(2).integers(0, 256, (5, kind.row_bytes(768)), np.uint8)
    return blocks & np.uint8(0xBF)


@pytest.mark.parametrize("kind", READ_BY_GGUF, ids=lambda kind: kind.name)
def test_equal_to_gguf(kind: BlockType) -> None:
    blocks = blocks_of(kind)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.number)).reshape(5, 768).copy()
    np.testing.assert_array_equal(dequantize_rows(blocks, kind, 768), theirs)
    blocks[2] = blocks[1]
    assert not np.array_equal(dequantize_rows(blocks, kind, 768), theirs)


# Root mean square of the error on standard normal values, rounded up: a type that is read wrongly is off by 1 or more.
ERRORS = {
    "F32": 0, "F16": 3e-4, "BF16": 2e-3, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.04, "Q5_1": 0.04, "Q5_0": 0.05,
    "Q4_K": 0.08, "Q4_1": 0.08, "Q4_0": 0.09, "IQ4_NL": 0.08, "IQ4_XS": 0.08, "NVFP4": 0.1, "MXFP4": 0.12,
    "IQ3_S": 0.17, "Q3_K": 0.16, "IQ3_XXS": 0.22, "Q2_K": 0.3, "Q1_0": 0.7, "Q2_0": 0.8, "TQ1_0": 0.9, "TQ2_0": 0.9,
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_there_and_back(name: str) -> None:
    rows = normal(8, 768)
    back = dequantize_rows(quantize_rows(rows, TYPES[name]), TYPES[name], 768)
    assert back.shape == rows.shape
    assert np.sqrt(np.mean((back - rows) ** 2)) <= ERRORS[name]
    assert np.sqrt(np.mean((back[::-1] - rows) ** 2)) > 1


def test_any_layout_of_bytes() -> None:
    blocks = quantize_rows(normal(8, 256), TYPES["Q8_0"])
    every_other = dequantize_rows(blocks[::2], TYPES["Q8_0"], 256)
    np.testing.assert_array_equal(every_other, dequantize_rows(blocks, TYPES["Q8_0"], 256)[::2])


@pytest.mark.parametrize("name", ["I8", "I32", "F64"])
def test_what_is_no_weight_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"cannot read {name} as float32"):
        dequantize_rows(np.zeros((1, TYPES[name].row_bytes(256)), np.uint8), TYPES[name], 256)


@pytest.mark.parametrize(("shape", "n_cols"), [((2, 143), 256), ((2, 144), 255), ((288,), 512), ((2, 144), 512)])
def test_bytes_that_are_no_rows_are_refused(shape: tuple[int, ...], n_cols: int) -> None:
    with pytest.raises(FormatError, match="are not rows of"):
        dequantize_rows(np.zeros(shape, np.uint8), TYPES["Q4_K"], n_cols)


def test_our_table_of_types_is_the_librarys() -> None:
    """But for Q8_1, which no file holds: the gguf package, whose table is ours, says 40 bytes, the library 36."""
    for kind in TYPES.values():
        if kind.name != "Q8_1":
            ggml_base.traits(kind)
    with pytest.raises(UnsupportedError, match="stores Q4_K otherwise"):
        ggml_base.traits(BlockType("Q4_K", 12, 256, 145))
    with pytest.raises(UnsupportedError, match="stores Q4_K otherwise"):
        ggml_base.traits(BlockType("Q4_K", 13, 256, 144))
