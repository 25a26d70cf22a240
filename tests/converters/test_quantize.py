"""Casts are those of llama.cpp, and recipes know more shapes than small models have."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest

from converters.quant_types import TYPES, ModelShape, choose_types, find_recipe
from converters.quantize import _library_path, quantize_rows

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
    row = getattr(ctypes.CDLL(str(_library_path())), function)
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


def layers(count: int, rows: int = 256) -> dict[str, tuple[int, ...]]:
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.{layer}.{name}.weight": (rows, rows) for layer in range(count) for name in names}
    return {**shapes, "token_embd.weight": (512, rows), "blk.0.attn_norm.weight": (rows,)}


def chosen(shapes: dict[str, tuple[int, ...]], model: ModelShape) -> dict[str, str]:
    return {name: kind.name for name, kind in choose_types(shapes, find_recipe("q4_k_m"), model).items()}


def test_the_70b_shape_gets_more_for_its_values() -> None:
    small = chosen(layers(80), ModelShape("llama", 80, 64, 64))
    large = chosen(layers(80), ModelShape("llama", 80, 64, 8))
    assert small["blk.10.attn_v.weight"] == "Q4_K"
    assert large["blk.10.attn_v.weight"] == "Q5_K"
    assert small["blk.9.attn_v.weight"] == large["blk.9.attn_v.weight"] == "Q6_K"


def test_eight_experts() -> None:
    types = chosen(layers(4), ModelShape("llama", 4, 8, 2, n_expert=8))
    assert types["blk.2.attn_v.weight"] == types["blk.2.attn_k.weight"] == "Q8_0"
    assert types["blk.2.attn_output.weight"] == "Q5_K"


def test_tied_embeddings_are_the_output() -> None:
    shapes = layers(1)
    assert chosen(shapes, ModelShape("llama", 1, 8, 8))["token_embd.weight"] == "Q6_K"
    untied = chosen({**shapes, "output.weight": (512, 256)}, ModelShape("llama", 1, 8, 8))
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("Q4_K", "Q6_K")


@pytest.mark.parametrize(("rows", "expected"), [(256, "Q4_K"), (288, "Q5_0"), (300, "F16")])
def test_rows_that_do_not_fill_blocks(rows: int, expected: str) -> None:
    types = chosen(layers(1, rows), ModelShape("llama", 1, 4, 4))
    assert types["blk.0.attn_q.weight"] == expected
    assert types["blk.0.attn_norm.weight"] == "F32"
