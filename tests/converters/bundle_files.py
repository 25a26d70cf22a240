"""Bases and adapters for bundles: copies of a GGUF with some keys and tensors changed, and random adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from converters.base_file import BaseFile
from converters.block_types import TYPES
from converters.bundle_layout import MATRICES
from converters.quantize import Bytes, quantize_rows
from converters.reader import read_header
from converters.writer import TensorSpec, Value, create, header_bytes

Tensors = Mapping[str, "np.ndarray | None"]


def write_gguf(
    path: Path, metadata: Mapping[str, Value], tensors: Iterable[tuple[TensorSpec, Bytes]], alignment: int = 32
) -> Path:
    """A whole file from keys and tensors."""
    listed = list(tensors)
    with create(path, header_bytes(metadata, [spec for spec, _ in listed], alignment)) as file:
        for spec, data in listed:
            file.write(np.ascontiguousarray(data).data)
            file.end_tensor(spec)
    return path


def copy_of(
    source: Path,
    path: Path,
    tensors: Tensors | None = None,
    metadata: Mapping[str, Value | None] | None = None,
) -> Path:
    """`source` with F32 tensors and keys laid over its own; None leaves one out."""
    new, keys = tensors or {}, metadata or {}
    with BaseFile(source) as base:
        kept: dict[str, Value] = {key: base.header.metadata.raw(key) for key in base.header.metadata if key not in keys}
        kept |= {key: value for key, value in keys.items() if value is not None}
        own = [
            (TensorSpec(name, tensor.shape, TYPES[tensor.type_name]), base.blocks(name))
            for name, tensor in base.header.tensors.items()
            if name not in new
        ]
        return write_gguf(path, kept, [*own, *(_f32(name, array) for name, array in new.items() if array is not None)])


def _f32(name: str, array: np.ndarray, kind: str = "F32") -> tuple[TensorSpec, Bytes]:
    rows = np.ascontiguousarray(array, np.float32)
    return TensorSpec(name, rows.shape, TYPES[kind]), quantize_rows(rows.reshape(-1, rows.shape[-1]), TYPES[kind])


def write_adapter(
    path: Path,
    base: Path,
    seed: int,
    *,
    rank: int = 4,
    kind: str = "F32",
    matrices: Iterable[str] = tuple(MATRICES),
    strength: float = 0.15,
    tensors: Tensors | None = None,
    metadata: Mapping[str, Value] | None = None,
) -> Path:
    """A strong random LoRA on these matrices of every layer; `tensors` are laid over it."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray | None] = {}
    for name, tensor in read_header(base).tensors.items():
        if name.endswith(".weight") and name.split(".")[-2] in matrices:
            n_out, n_in = tensor.shape
            weights[f"{name}.lora_a"] = rng.standard_normal((rank, n_in), dtype=np.float32) * n_in**-0.5
            weights[f"{name}.lora_b"] = rng.standard_normal((n_out, rank), dtype=np.float32) * strength
    keys: dict[str, Value] = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
        **(metadata or {}),
    }
    listed = [_f32(name, array, kind) for name, array in {**weights, **(tensors or {})}.items() if array is not None]
    return write_gguf(path, keys, listed)
