"""Llama folders whose linear weights are stored quantized: random codes and scales in the tensors of each format.

Codes are drawn, not made from weights: what is tested is what they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.converters.folders import CONFIG, make_model, weights, write_json

Parts = dict[str, tuple[str, np.ndarray[Any, Any]]]
"""Tensors by name: the dtype as safetensors names it, and the array that holds its bits."""
Encode = Callable[[np.random.Generator, str, tuple[int, int]], Parts]

# No size is a multiple of 128, rows are whole words of 4-bit numbers.
SIZES: Mapping[str, Any] = {"hidden_size": 160, "intermediate_size": 224, "head_dim": 40}


def stored_bytes(tensors: Parts) -> bytes:
    """A safetensors file."""
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def make_quantized(folder: Path, quantization: Mapping[str, Any] | None, encode: Encode, **config: Any) -> Path:
    """The model of `make_model` with the linear weights of its layers (the output is not) encoded."""
    full = {**CONFIG, **SIZES, **config}
    make_model(folder, **full)
    rng, tensors = np.random.default_rng(1), Parts()
    for name, array in weights(full).items():
        if name.endswith("_proj.weight"):
            tensors |= encode(rng, name.removesuffix(".weight"), array.shape)
        else:
            tensors[name] = ("F32", array)
    write(folder, tensors)
    if quantization is not None:
        write_json(folder / "config.json", {**full, "quantization_config": quantization})
    return folder


def write(folder: Path, tensors: Parts) -> None:
    (folder / "model.safetensors").write_bytes(stored_bytes(tensors))


def read(folder: Path) -> Parts:
    """The tensors of a folder, to change and `write` again."""
    numpy_dtypes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1"}
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors: Parts = {}
    for name, entry in json.loads(data[8:start]).items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[start + begin : start + end], numpy_dtypes.get(entry["dtype"], "u1"))
        tensors[name] = (entry["dtype"], array.reshape(entry["shape"]))
    return tensors


def float8(rng: np.random.Generator, shape: tuple[int, ...], kind: str = "F8_E4M3") -> tuple[str, np.ndarray[Any, Any]]:
    """Every code but those of NaN and infinity."""
    codes = rng.integers(0, 0x7F if kind == "F8_E4M3" else 0x7C, shape) | rng.integers(0, 2, shape) << 7
    return kind, codes.astype(np.uint8)


def scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "F32") -> tuple[str, np.ndarray[Any, Any]]:
    values = rng.uniform(0.001, 0.02, shape).astype(np.float32)
    if dtype == "BF16":
        return dtype, (values.view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "F8_E8M0":
        return dtype, rng.integers(118, 124, shape).astype(np.uint8)
    return dtype, values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def words(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[str, np.ndarray[Any, Any]]:
    return "I32", rng.integers(-(2**31), 2**31, shape).astype(np.int32)


def fp8(block: int | None = 128, *, scale: str = "F32", kind: str = "F8_E4M3", end: str = "weight_scale_inv") -> Encode:
    def encode(rng: np.random.Generator, module: str, shape: tuple[int, int]) -> Parts:
        grid = (-(-shape[0] // block), -(-shape[1] // block)) if block else ()
        return {
            f"{module}.weight": float8(rng, shape, kind),
            f"{module}.{end}": scales(rng, grid, scale),
            f"{module}.input_scale" if end == "weight_scale" else f"{module}.activation_scale": scales(rng, ()),
        }

    return encode


def with_scales(grid: Callable[[tuple[int, int]], tuple[int, ...]], *, kind: str, zero: bool = False) -> Encode:
    """compressed-tensors' weights beside a `weight_scale`."""

    def encode(rng: np.random.Generator, module: str, shape: tuple[int, int]) -> Parts:
        codes = float8(rng, shape) if kind == "F8_E4M3" else ("I8", rng.integers(-128, 128, shape).astype(np.int8))
        parts = {f"{module}.weight": codes, f"{module}.weight_scale": scales(rng, grid(shape), "BF16")}
        if zero:
            parts[f"{module}.weight_zero_point"] = ("I8", rng.integers(-9, 9, grid(shape)).astype(np.int8))
        return parts

    return encode


def packed(bits: int, group: int, *, zero: bool = False, order: bool = False, channel: bool = False) -> Encode:
    def encode(rng: np.random.Generator, module: str, shape: tuple[int, int]) -> Parts:
        (rows, columns), per_word = shape, 32 // bits
        groups = 1 if channel else -(-columns // group)
        parts = {
            f"{module}.weight_packed": words(rng, (rows, -(-columns // per_word))),
            f"{module}.weight_scale": scales(rng, (rows, groups), "BF16"),
            f"{module}.weight_shape": ("I64", np.array(shape, np.int64)),
        }
        if zero:
            parts[f"{module}.weight_zero_point"] = words(rng, (-(-rows // per_word), groups))
        if order:
            parts[f"{module}.weight_g_idx"] = ("I32", rng.permutation(np.arange(columns) // group).astype(np.int32))
        return parts

    return encode


def gptq(bits: int, group: int, *, act_order: bool = False, bias: bool = False) -> Encode:
    def encode(rng: np.random.Generator, module: str, shape: tuple[int, int]) -> Parts:
        (rows, columns), groups = shape, -(-shape[1] // group)
        order = (np.arange(columns) // group).astype(np.int32)
        parts = {
            f"{module}.qweight": words(rng, (columns * bits // 32, rows)),
            f"{module}.qzeros": words(rng, (groups, rows * bits // 32)),
            f"{module}.scales": scales(rng, (groups, rows), "F16"),
            f"{module}.g_idx": ("I32", rng.permutation(order) if act_order else order),
        }
        if bias:
            parts[f"{module}.bias"] = ("F16", np.zeros(rows, np.float16))
        return parts

    return encode


def awq(group: int) -> Encode:
    def encode(rng: np.random.Generator, module: str, shape: tuple[int, int]) -> Parts:
        (rows, columns), groups = shape, -(-shape[1] // group)
        return {
            f"{module}.qweight": words(rng, (columns, rows // 8)),
            f"{module}.qzeros": words(rng, (groups, rows // 8)),
            f"{module}.scales": scales(rng, (groups, rows), "F16"),
        }

    return encode


def compressed(form: str, **weights_config: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", **weights_config}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


GPTQ: Mapping[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ: Mapping[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
BLOCK_FP8: Mapping[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
BY_ROW, BY_TENSOR = (lambda shape: (shape[0], 1)), (lambda shape: (1,))


def by_block(block: int) -> Callable[[tuple[int, int]], tuple[int, ...]]:
    return lambda shape: (-(-shape[0] // block), -(-shape[1] // block))


# What llama.cpp's converter computes back too: settings of the quantization, and its tensors.
SHARED: Mapping[str, tuple[Mapping[str, Any], Encode]] = {
    "fp8 blocks": (BLOCK_FP8, fp8(128)),
    "fp8 small blocks of powers of two": (
        {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}, fp8(32, scale="F8_E8M0")),
    "fp8 blocks, bf16 scales": ({"quant_method": "fp8", "weight_block_size": [48, 48]}, fp8(48, scale="BF16")),
    "fp8 per tensor": ({"quant_method": "fp8", "weight_block_size": None}, fp8(None)),
    "fp8 e5m2 per tensor": ({"quant_method": "fp8"}, fp8(None, kind="F8_E5M2", scale="BF16")),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8(None, end="weight_scale")),
    "float-quantized channel": (
        compressed("float-quantized", type="float", strategy="channel"), with_scales(BY_ROW, kind="F8_E4M3")),
    "float-quantized block": (
        compressed("float-quantized", type="float", strategy="block", block_structure=[128, 128]),
        with_scales(by_block(128), kind="F8_E4M3")),
    "int-quantized channel": (compressed("int-quantized", strategy="channel"), with_scales(BY_ROW, kind="I8")),
    "naive-quantized channel": (compressed("naive-quantized", strategy="channel"), with_scales(BY_ROW, kind="I8")),
    "pack-quantized 4": (compressed("pack-quantized", num_bits=4, strategy="group", group_size=32), packed(4, 32)),
    "pack-quantized 8": (compressed("pack-quantized", num_bits=8, strategy="group", group_size=16), packed(8, 16)),
    "pack-quantized 3": (compressed("pack-quantized", num_bits=3, strategy="group", group_size=32), packed(3, 32)),
    "pack-quantized 4 with zeros": (
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
        packed(4, 32, zero=True)),
    "gptq 4": (GPTQ, gptq(4, 32)),
    "gptq 4 act-order": ({**GPTQ, "desc_act": True}, gptq(4, 32, act_order=True)),
    "gptq 2": ({**GPTQ, "bits": 2, "group_size": 16}, gptq(2, 16)),
    "gptq 8": ({**GPTQ, "bits": 8, "checkpoint_format": "gptq"}, gptq(8, 32)),
    "gptq 8, v2": ({**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}, gptq(8, 32)),
    "gptq 4, v2, last group short": (
        {**GPTQ, "group_size": 128, "checkpoint_format": "gptq_v2"}, gptq(4, 128)),
}  # fmt: skip
