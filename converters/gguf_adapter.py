"""A GGUF adapter read back into pairs: to give it another type or contract, to blend it, to merge it.

Whatever scale its file asks for (`adapter.lora.alpha`) goes into B, as in our own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from converters.adapter_file import RESIDUAL, SCALES
from converters.base_file import BaseFile
from converters.checkpoint import Floats
from converters.errors import FormatError, UnsupportedAdapterError, listed
from converters.pairs import Pair
from converters.reader import GGUFHeader, TensorInfo
from converters.tensor_kinds import EMBEDDING
from converters.writer import Value

# Keys that a new file gets of its own.
OWN_KEYS = ("adapter.lora.alpha", "general.file_type", "general.quantization_version", SCALES, RESIDUAL)


@dataclass(frozen=True)
class GGUFAdapter:
    """An open GGUF adapter.

    Attributes:
        keys: its metadata as it lies there, but for what its tensors' type decides.
    """

    path: Path
    header: GGUFHeader
    pairs: tuple[Pair, ...]
    keys: dict[str, Value]

    @property
    def base_fingerprint(self) -> str:
        return str(self.header.metadata.get("edgelora.base.fingerprint") or "")


@contextmanager
def open_gguf_adapter(path: Path) -> Iterator[GGUFAdapter]:
    """Open it; its tensors are read while it is open.

    Raises:
        UnsupportedAdapterError: tensors that are no pairs of A and B: trained norms, control vectors.
        FormatError: no adapter, or damaged.
    """
    with BaseFile(path) as file:
        header = file.header
        if header.kind != "adapter":
            raise FormatError(f"{path}: is a base, and an adapter is needed here")
        if problems := _problems(header):
            raise UnsupportedAdapterError(
                f"{path}: cannot be read as an adapter:{listed(problems)}",
                hint="Convert it again from its PEFT folder.",
            )
        keys: dict[str, Value] = {key: header.metadata.raw(key) for key in header.metadata if key not in OWN_KEYS}
        yield GGUFAdapter(path, header, tuple(_pairs(file)), keys)


def _problems(header: GGUFHeader) -> list[str]:
    metadata = header.metadata
    found = []
    if metadata.get("adapter.type") != "lora":
        found.append(f"adapter.type is {metadata.get('adapter.type')!r}, expected 'lora'")
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        found.append(f"adapter.lora.alpha is {alpha!r}, expected a number")
    targets = {name.rpartition(".lora_")[0] for name in header.tensors}
    for name in header.tensors:
        if not name.endswith((".lora_a", ".lora_b")):
            found.append(f"{name}: no A and no B")
    for target in sorted(targets - {""}):
        found += _pair_problems(target, header.tensors.get(f"{target}.lora_a"), header.tensors.get(f"{target}.lora_b"))
    return found or ([] if targets else ["it has no tensors"])


def _pair_problems(target: str, a: TensorInfo | None, b: TensorInfo | None) -> list[str]:
    if a is None or b is None:
        return [f"{target}: has only its {'A' if b is None else 'B'}"]
    rank = a.shape[-1] if target == EMBEDDING else a.shape[-2] if len(a.shape) > 1 else 0
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or a.shape[:-2] != b.shape[:-2] or rank != b.shape[-1]:
        return [f"{target}: A {a.shape} and B {b.shape} do not share a rank"]
    return []


def _pairs(file: BaseFile) -> Iterator[Pair]:
    header = file.header
    alpha = float(header.metadata.get("adapter.lora.alpha", 0.0))
    targets = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in header.tensors))
    scales, lost = (_numbers(header.metadata.get(key), len(targets)) for key in (SCALES, RESIDUAL))
    for target, scale, residual in zip(targets, scales, lost, strict=True):
        a, b = header.tensors[f"{target}.lora_a"], header.tensors[f"{target}.lora_b"]
        rank = b.shape[-1]
        shape = (a.shape[-2], b.shape[-2]) if target == EMBEDDING else (*a.shape[:-2], b.shape[-2], a.shape[-1])
        factor = alpha / rank if alpha else 1.0
        known = (scale,) if scale else (factor,) if alpha else ()
        yield Pair(target, shape, rank, partial(_load, file, target, factor), known, max(residual, 0.0))


def _numbers(value: Any, count: int) -> list[float]:
    """One for each pair, 0 where it is not known."""
    given = value if isinstance(value, list) and len(value) == count else []
    return [float(item) if isinstance(item, float) and math.isfinite(item) else 0.0 for item in given] or [0.0] * count


def _load(file: BaseFile, target: str, factor: float) -> tuple[Floats, Floats]:
    a, b = _tensor(file, f"{target}.lora_a"), _tensor(file, f"{target}.lora_b")
    if target == EMBEDDING:  # looked up by row: its A is our B
        return a * np.float32(factor), np.ascontiguousarray(b.T)
    return b * np.float32(factor), a


def _tensor(file: BaseFile, name: str) -> Floats:
    return file.rows(name).reshape(file.header.tensors[name].shape)
