"""GGUF files made from another one by changing some of its tensors and keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Arrays = Mapping[str, np.ndarray[Any, Any]]


def read_tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of an F32 file, in numpy's order of dimensions."""
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def write_copy(source: Path, out: Path, changes: Arrays, metadata: Mapping[str, Any] | None = None) -> Path:
    """`source` with `changes` laid over its tensors and `metadata` over its keys."""
    return write_gguf(source, out, {**read_tensors(source), **changes}, metadata or {})


def write_gguf(source: Path, out: Path, arrays: Arrays, metadata: Mapping[str, Any], only: str = "") -> Path:
    """These tensors with the keys of `source` (those that begin with `only`) under `metadata`."""
    fields = gguf.GGUFReader(source).fields
    kept = {k: f for k, f in fields.items() if k.startswith(only) and not k.startswith(("GGUF.", "general.arch"))}
    writer = gguf.GGUFWriter(out, str(fields["general.architecture"].contents()))
    for key, field in kept.items():
        if key not in metadata:
            item = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], item)
    for key, value in metadata.items():
        kinds = gguf.GGUFValueType
        kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32}[type(value)]
        writer.add_key_value(key, value, kind)
    for name, array in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
