"""Copies of a GGUF adapter with something wrong in them: what happens between a trainer's machine and a laptop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[Any]]
Damage = Callable[[Tensors], Tensors]
HEADS = 8  # of the bundled base's queries


def write_damaged(
    source: Path, out: Path, damage: Damage = lambda tensors: tensors, metadata: Mapping[str, str | None] | None = None
) -> Path:
    """`source` with its tensors passed through `damage`, and text keys replaced (None leaves one out)."""
    reader, changes = gguf.GGUFReader(source), metadata or {}
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in changes:
            item = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], item)
    for key, value in changes.items():
        if value is not None:
            writer.add_string(key, value)
    for name, array in damage({tensor.name: np.array(tensor.data) for tensor in reader.tensors}).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def scaled(factor: float) -> Damage:
    return lambda tensors: {
        name: (array * factor).astype(array.dtype) if name.endswith(".lora_b") else array
        for name, array in tensors.items()
    }


def permuted_queries(tensors: Tensors) -> Tensors:
    """Rows of attn_q as transformers has them, which a converter forgot to bring into llama.cpp's order."""

    def turned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        rows = array.reshape(HEADS, array.shape[0] // HEADS // 2, 2, -1)
        return rows.swapaxes(1, 2).reshape(array.shape)

    return {n: turned(array) if n.endswith("attn_q.weight.lora_b") else array for n, array in tensors.items()}


def without(*beginnings: str) -> Damage:
    return lambda tensors: {name: array for name, array in tensors.items() if not name.startswith(beginnings)}


def filled(name: str, value: float) -> Damage:
    return lambda tensors: {n: np.full_like(a, value) if n == name else a for n, a in tensors.items()}
