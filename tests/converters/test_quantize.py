"""Casts are those of llama.cpp; rows stand alone, experts have their own importance; what would abort is refused."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys

import numpy as np
import pytest

from converters.block_types import BlockType
from converters.errors import UnsupportedError
from converters.ggml_base import library_path
from converters.quant_types import ABORTS_WITHOUT_IMATRIX, TYPES
from converters.quantize import quantize_rows

# Every kind of float32: normal, subnormal, zero, infinite, the largest, the F16 limits, and halves that round to even.
EDGES = [
    0.0,
    -0.0,
    1.0,
    -2.5,
    1e-40,
    6e-8,
    5.9e-8,
    65504.0,
    65519.9,
    65520.0,
    3e38,
    np.inf,
    -np.inf,
    1.00390625,
    1.01171875,
]


def floats() -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = np.concatenate([np.array(EDGES, np.float32), bits.view(np.float32)])
    return values[~np.isnan(values)]


@pytest.mark.parametrize(
    ("name", "function"), [("F16", "ggml_fp32_to_fp16_row"), ("BF16", "ggml_fp32_to_bf16_row_ref")]
)
def test_casts_are_bit_equal_to_llama_cpps(name: str, function: str) -> None:
    values = floats()
    theirs = np.empty(len(values), np.uint16)
    row = getattr(ctypes.CDLL(str(library_path())), function)
    row.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    row(values.ctypes.data, theirs.ctypes.data, len(values))
    ours = quantize_rows(values.reshape(1, -1), TYPES[name]).view(np.uint16)[0]
    np.testing.assert_array_equal(ours, theirs)


def test_nan_stays_nan() -> None:
    values = np.array(
        [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in (0x7F800001, 0xFFFFFFFF)], np.float32
    )
    bits = quantize_rows(values.reshape(1, -1), TYPES["BF16"]).view(np.uint16)[0].astype(np.uint32) << 16
    assert np.isnan(bits.view(np.float32)).all()


MADE = [kind for kind in TYPES.values() if kind.can_be_made]
# Filling the tables of the others takes llama.cpp seconds.
QUICK = [kind for kind in MADE if kind.name[:3] not in ("IQ1", "IQ2")]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def importance(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).random(shape, np.float32)


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.name)
def test_chunks_are_the_whole(kind: BlockType) -> None:
    rows, weights = normal(7, 256), importance(256)
    whole = quantize_rows(rows, kind, weights)
    assert whole.shape == (7, kind.row_bytes(256))
    parts = [quantize_rows(rows[start:stop], kind, weights) for start, stop in ((0, 3), (3, 4), (4, 7))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(quantize_rows(rows[::-1], kind, weights), whole)


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0", "Q5_1", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "Q2_K", "Q3_K"])
def test_importance_changes_bytes(name: str) -> None:
    rows = normal(4, 256)
    plain = quantize_rows(rows, TYPES[name])
    assert not np.array_equal(quantize_rows(rows, TYPES[name], importance(256)), plain)


@pytest.mark.parametrize("name", ["Q8_0", "MXFP4", "BF16"])
def test_importance_does_not_change_bytes(name: str) -> None:
    rows = normal(4, 256)
    np.testing.assert_array_equal(quantize_rows(rows, TYPES[name], importance(256)), quantize_rows(rows, TYPES[name]))


def test_what_needs_importance_aborts_in_llama_cpp_and_is_refused_here() -> None:
    requires = ctypes.CDLL(str(library_path())).ggml_quantize_requires_imatrix
    requires.restype = ctypes.c_bool
    assert {name for name, kind in TYPES.items() if requires(kind.number)} == ABORTS_WITHOUT_IMATRIX
    for name in ABORTS_WITHOUT_IMATRIX:
        with pytest.raises(UnsupportedError, match=f"{name} has too few bits") as raised:
            quantize_rows(normal(2, 256), TYPES[name])
        assert "--imatrix" in raised.value.hint


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_values_that_would_end_the_process_are_refused(name: str, value: float) -> None:
    rows = normal(3, 256)
    rows[1, 17] = value
    with pytest.raises(UnsupportedError, match=f"{name} cannot hold values that are not finite"):
        quantize_rows(rows, TYPES[name], importance(256))


@pytest.mark.slow
def test_they_do_end_the_process() -> None:
    program = (
        "import numpy as np; from converters import quantize as q; from converters.block_types import TYPES;"
        "q._fits_a_grid = lambda rows: True; rows = np.ones((1, 256), np.float32); rows[0, 3] = np.{value};"
        "q.quantize_rows(rows, TYPES['IQ3_S'])"
    )
    for value, aborts in (("nan", True), ("pi", False)):
        done = subprocess.run([sys.executable, "-c", program.format(value=value)], capture_output=True, check=False)
        assert (done.returncode != 0) == aborts


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_importance_that_makes_no_sense_is_refused(value: float) -> None:
    weights = importance(256)
    weights[3] = value
    with pytest.raises(UnsupportedError, match="negative or not finite"):
        quantize_rows(normal(2, 256), TYPES["Q4_K"], weights)


def test_importance_of_another_width_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"importance has shape \(512,\), rows have 256 values"):
        quantize_rows(normal(2, 256), TYPES["Q4_K"], importance(512))


def test_rows_that_fill_no_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="rows of 300 do not fill Q4_K's blocks of 256"):
        quantize_rows(normal(2, 300), TYPES["Q4_K"])


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "I32"])
def test_types_that_cannot_be_made_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"llama.cpp cannot quantize to {name}"):
        quantize_rows(normal(2, 256), TYPES[name])
