"""Weights that a checkpoint stores quantized are computed back as llama.cpp's converter does, and as their own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.base import convert_base
from converters.checkpoint import Checkpoint
from converters.reader import read_header
from converters.shards import DTYPES
from tests.converters import quantized_folders as quantized
from tests.converters.folders import write_json
from tests.equivalence import reference

pytestmark = pytest.mark.train


def tensor_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    header, data = read_header(path), path.read_bytes()
    return {
        name: (tensor.type_name, tensor.shape, data[tensor.offset : tensor.offset + tensor.size_bytes])
        for name, tensor in header.tensors.items()
    }


def dequantized(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.rows(name).reshape(tensor.shape) for name, tensor in checkpoint.tensors.items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Path]]:
    """Each folder, and llama.cpp's conversion of it, by a name of `SHARED`."""
    reference.reference_root()
    root = tmp_path_factory.mktemp("quantized")
    folders = {}
    for name, (settings, encode) in quantized.SHARED.items():
        folders[name] = quantized.make_quantized(root / name.replace(" ", "-"), settings, encode)
        write_json(folders[name] / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return folders, reference.convert(folders, root)


@pytest.mark.parametrize("name", quantized.SHARED)
def test_equal_to_llama_cpp(name: str, theirs: tuple[dict[str, Path], dict[str, Path]], tmp_path: Path) -> None:
    convert_base(theirs[0][name], tmp_path / "ours.gguf", quant="f32")
    ours, reference_tensors = tensor_bytes(tmp_path / "ours.gguf"), tensor_bytes(theirs[1][name])
    assert ours == reference_tensors
    assert len(ours) == 21


def test_a_changed_scale_is_seen(theirs: tuple[dict[str, Path], dict[str, Path]], tmp_path: Path) -> None:
    settings, encode = quantized.SHARED["gptq 4"]
    folder = quantized.make_quantized(tmp_path / "model", settings, encode)
    tensors = quantized.read(folder)
    name = "model.layers.1.mlp.up_proj.scales"
    changed = tensors[name][1].copy()
    changed[0, 0] += np.float16(0.001)
    quantized.write(folder, {**tensors, name: ("F16", changed)})
    convert_base(folder, tmp_path / "ours.gguf", quant="f32")
    ours, reference_tensors = tensor_bytes(tmp_path / "ours.gguf"), tensor_bytes(theirs[1]["gptq 4"])
    assert [name for name in ours if ours[name] != reference_tensors[name]] == ["blk.1.ffn_up.weight"]


@pytest.mark.parametrize(
    ("dtype", "torch_name"),
    [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"), ("F8_E8M0", "float8_e8m0fnu")],
)
def test_every_float8_is_torchs(dtype: str, torch_name: str) -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(getattr(torch, torch_name)).float().numpy()
    np.testing.assert_array_equal(DTYPES[dtype][1](codes), expected)


def test_awq_by_its_own_code(tmp_path: Path) -> None:
    """`dequantize_gemm` of AutoAWQ in torch: unpack by shifts, pick columns by the reverse order, subtract, scale."""
    torch = pytest.importorskip("torch")
    folder = quantized.make_quantized(tmp_path, quantized.AWQ, quantized.awq(32))
    parts, ours = quantized.read(folder), dequantized(folder)
    names = [name.removesuffix(".qweight") for name in parts if name.endswith(".qweight")]
    assert len(names) == 14
    for name in names:
        tensors = {end: torch.from_numpy(parts[f"{name}.{end}"][1].copy()) for end in ("qweight", "qzeros", "scales")}
        np.testing.assert_array_equal(ours[f"{name}.weight"], _awq(torch, **tensors, group=32).numpy())
        in_order = _awq(torch, **tensors, group=32, reverse=range(8)).numpy()
        assert not np.array_equal(ours[f"{name}.weight"], in_order)


def _awq(
    torch: Any, qweight: Any, qzeros: Any, scales: Any, group: int, reverse: Any = (0, 4, 1, 5, 2, 6, 3, 7)
) -> Any:
    shifts = torch.arange(0, 32, 4)

    def unpack(words: Any) -> Any:
        numbers = torch.bitwise_right_shift(words[:, :, None], shifts[None, None, :]).to(torch.int8)
        numbers = numbers.view(words.shape[0], -1)
        order = torch.arange(numbers.shape[1]).view(-1, 8)[:, list(reverse)].reshape(-1)
        return torch.bitwise_and(numbers[:, order], 15)

    numbers, zeros = unpack(qweight), unpack(qzeros).repeat_interleave(group, dim=0)
    return ((numbers - zeros).float() * scales.float().repeat_interleave(group, dim=0)).T


# compressed-tensors' own `dequantize`: (number - zero) * scale, the scale broadcast or repeated over its group.
CompressedCase = tuple[Mapping[str, Any], quantized.Encode]
COMPRESSED: dict[str, CompressedCase] = {
    "per tensor": (
        quantized.compressed("float-quantized", type="float", strategy="tensor"),
        quantized.with_scales(quantized.BY_TENSOR, kind="F8_E4M3"),
    ),
    "channel with zeros": (
        quantized.compressed("int-quantized", strategy="channel", symmetric=False),
        quantized.with_scales(quantized.BY_ROW, kind="I8", zero=True),
    ),
    "groups": (
        quantized.compressed("int-quantized", strategy="group", group_size=32),
        quantized.with_scales(lambda shape: (shape[0], -(-shape[1] // 32)), kind="I8", zero=True),
    ),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_by_its_formula(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = quantized.make_quantized(tmp_path, *COMPRESSED[name])
    parts, ours = quantized.read(folder), dequantized(folder)
    for weight in [name for name in parts if name.endswith("_proj.weight")]:
        dtype, codes = parts[weight]
        number = torch.from_numpy(codes.copy())
        number = (number.view(torch.float8_e4m3fn) if dtype == "F8_E4M3" else number).float()
        scale = torch.from_numpy(parts[f"{weight}_scale"][1].copy()).view(torch.bfloat16).float()
        zero = (
            torch.from_numpy(parts[f"{weight}_zero_point"][1].copy()).float() if f"{weight}_zero_point" in parts else 0
        )
        if name == "groups":
            scale, zero = (each.repeat_interleave(32, dim=1)[:, : number.shape[1]] for each in (scale, zero))
        np.testing.assert_array_equal(ours[weight], ((number - zero) * scale).numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4_bits(kind: str, nested: bool, dtype: str, tmp_path: Path) -> None:
    """By its kernel for the CPU; rows are whole blocks, the only ones that this kernel reads right."""
    functional = pytest.importorskip("bitsandbytes.functional")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    ours, expected = _four_bits(tmp_path, functional.dequantize_4bit, kind, nested, dtype, **sizes)
    for name, values in expected.items():
        np.testing.assert_array_equal(ours[name], values)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_bitsandbytes_4_bits_whose_blocks_go_over_rows(nested: bool, tmp_path: Path) -> None:
    """By its torch code, which every device without a kernel of its own runs."""
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.functional")
    ops = pytest.importorskip("bitsandbytes.backends.default.ops")
    utils = pytest.importorskip("bitsandbytes.backends.utils")

    def dequantize(codes: Any, state: Any) -> Any:
        largest = state.absmax
        if state.nested:
            largest = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        table = utils._get_4bit_code("nf4", codes.device)
        with torch.compiler.set_stance("force_eager"):
            return ops._dequantize_4bit_compute(
                codes.reshape(-1), largest, table, state.blocksize, state.shape, state.dtype
            )

    ours, expected = _four_bits(tmp_path, dequantize, "nf4", nested, "float32")
    for name, values in expected.items():
        np.testing.assert_array_equal(ours[name], values)


def _four_bits(
    folder: Path, dequantize: Callable[[Any, Any], Any], kind: str, nested: bool, dtype: str, **sizes: int
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, np.ndarray[Any, Any]]]:
    """Our weights and bitsandbytes' own."""
    import torch
    from bitsandbytes import functional

    expected: dict[str, np.ndarray[Any, Any]] = {}
    of = {np.dtype(np.uint8): "U8", np.dtype(np.float32): "F32"}

    def encode(rng: np.random.Generator, module: str, shape: tuple[int, int]) -> quantized.Parts:
        weight = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(getattr(torch, dtype))
        codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
        expected[f"{module}.weight"] = dequantize(codes, state).float().numpy()
        parts = {name: tensor.numpy() for name, tensor in state.as_dict(packed=True).items()}
        return {
            f"{module}.weight": ("U8", codes.numpy()),
            **{f"{module}.weight.{name}": (of[array.dtype], array) for name, array in parts.items()},
        }

    settings = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    ours = dequantized(quantized.make_quantized(folder, settings, encode, **sizes))
    assert len(expected) == 14
    return ours, expected


def test_bitsandbytes_8_bits(tmp_path: Path) -> None:
    torch, functional = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.functional")
    expected: dict[str, Any] = {}

    def encode(rng: np.random.Generator, module: str, shape: tuple[int, int]) -> quantized.Parts:
        codes, largest, _ = functional.int8_vectorwise_quant(torch.randn(shape).half())
        expected[f"{module}.weight"] = functional.int8_vectorwise_dequant(codes, largest).numpy()
        return {
            f"{module}.weight": ("I8", codes.numpy()),
            f"{module}.SCB": ("F32", largest.numpy()),
            f"{module}.weight_format": ("U8", np.zeros((), np.uint8)),
        }

    folder = quantized.make_quantized(tmp_path, {"load_in_8bit": True, "quant_method": "bitsandbytes"}, encode)
    ours = dequantized(folder)
    assert len(expected) == 14
    for name, values in expected.items():
        np.testing.assert_array_equal(ours[name], values)
