"""The bundled base as GGUF, and adapters that are random but strong: each changes what the base says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.base import convert_base
from converters.reader import read_header
from edgelora.contract import Contract
from edgelora.engine.engine import Engine
from tests.conftest import TINY_BASE

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for quant in ("f32", "q8_0"):
        convert_base(TINY_BASE, folder / f"{quant}.gguf", quant=quant)
    return {quant: folder / f"{quant}.gguf" for quant in ("f32", "q8_0")}


@pytest.fixture(scope="session")
def base(bases: dict[str, Path]) -> Path:
    return bases["f32"]


def write_adapter(
    path: Path,
    base: Path,
    seed: int,
    *,
    strength: float = 0.15,
    rank: int = 4,
    contract: Contract | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """A LoRA on every linear of `base`. `metadata` and `tensors` are laid over what is written; None leaves one out."""
    header, rng = read_header(base), np.random.default_rng(seed)
    weights: dict[str, np.ndarray | None] = {}
    for name, tensor in header.tensors.items():
        if name.split(".")[-2] in LINEARS and name.endswith(".weight"):
            n_out, n_in = tensor.shape
            weights[f"{name}.lora_a"] = rng.standard_normal((rank, n_in), dtype=np.float32) * n_in**-0.5
            weights[f"{name}.lora_b"] = rng.standard_normal((n_out, rank), dtype=np.float32) * strength
    pairs: dict[str, Any] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
        **(contract.to_metadata() if contract else {}),
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, pairs.pop("general.architecture", header.architecture))
    for key, value in pairs.items():
        if value is not None:
            _add(writer, key, value)
    for name, array in {**weights, **(tensors or {})}.items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list) and value and type(value[0]) is int:
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT32)
        return
    add = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    add.get(type(value), writer.add_array)(key, value)  # type: ignore[operator]


@pytest.fixture
def make_adapter(tmp_path: Path, base: Path) -> MakeAdapter:
    """Writes an adapter into the test's own folder; see `write_adapter`."""

    def make(name: str = "made", seed: int = 7, **options: Any) -> Path:
        return write_adapter(tmp_path / f"{name}.gguf", base, seed, **options)

    return make


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / f"{name}.gguf", base, seed) for name, seed in (("red", 1), ("blue", 2))}


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    with Engine(base, adapters, threads=1) as engine:
        yield engine
