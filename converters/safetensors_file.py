"""The header of a safetensors file, checked before it is believed.

Eight bytes of header length, a JSON object, then the tensors:

    {"model.norm.weight": {"dtype": "BF16", "shape": [128], "data_offsets": [0, 256]}, "__metadata__": {...}}

The `safetensors` package reads BF16 only together with torch, which a laptop does not have.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from converters.errors import FormatError, MissingFileError, TruncatedFileError

MAX_HEADER_BYTES = 100_000_000  # the limit of the format itself
ITEM_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
MAX_DIMENSIONS = 16
_AGAIN = "Download the file again."


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        dtype: as safetensors names it: "BF16", "F32" ...
        offset: from the start of the file, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size_bytes: int


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file, by name, in the file's order.

    Raises:
        MissingFileError: no such file, or not readable.
        FormatError: not a safetensors file, or one that contradicts itself.
        TruncatedFileError: the file ends before its header says.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            _check_length(path, start, length, size)
            text = file.read(length)
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    entries = _parse(path, text)
    entries.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_places(path, tensors, 8 + length, size)
    return tensors


def _check_length(path: Path, start: bytes, length: int, size: int) -> None:
    if start.startswith(b"version "):
        raise FormatError(f"{path}: a Git LFS pointer, not the weights", hint="Fetch them with `git lfs pull`.")
    if size < 8 or (length <= MAX_HEADER_BYTES and 8 + length > size):
        raise TruncatedFileError(f"{path}: has {size} bytes, its header alone needs {8 + length}", hint=_AGAIN)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise FormatError(f"{path}: not a safetensors file (it starts with {start!r})")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise FormatError(f"{path}: a name occurs twice in its header")
        return dict(pairs)

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if b"\\ud" in text.lower():  # half a character, which no message could show
            json.dumps(entries, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: not a safetensors file (its header is not JSON)") from None
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: not a safetensors file (its header is not a JSON object)")
    return entries


def _stored(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _is_whole(shape) or not _is_whole(offsets) or len(offsets) != 2:
        raise FormatError(f"{path}: the header's entry for {name} is not valid")
    if dtype not in ITEM_BITS:
        raise FormatError(f"{path}: tensor {name} has unknown dtype {dtype!r}")
    begin, end = offsets
    if 8 * (end - begin) != prod(shape) * ITEM_BITS[dtype]:
        raise FormatError(f"{path}: tensor {name} is {dtype} {shape} and has {end - begin} bytes")
    return StoredTensor(name, dtype, tuple(shape), path, start + begin, end - begin)


def _is_whole(values: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_places(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    position = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset != position:
            what = "overlaps the one before it" if tensor.offset < position else "does not follow the one before it"
            raise FormatError(f"{path}: tensor {tensor.name} {what}")
        position += tensor.size_bytes
    if position < size:
        raise FormatError(f"{path}: has {size - position} bytes after its last tensor", hint=_AGAIN)
    if position > size:
        raise TruncatedFileError(
            f"{path}: has {size} bytes, its tensors need {position} ({position - size} are missing)", hint=_AGAIN
        )
