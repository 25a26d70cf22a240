"""Writing a GGUF file: whole under its final name, or not at all.

The header is written first, then each tensor's bytes as they come, so nothing is held in memory and there is no
intermediate file. The work goes to `NAME.RANDOM.partial` beside the target (behind a link, beside what it points to);
it is flushed to disk and renamed at the end.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from converters.errors import ConversionError, DiskFullError, OutputExistsError, WriteError
from converters.quant_types import BlockType
from converters.reader import ARRAY, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING

VERSION = 3
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EISDIR)  # network and FUSE file systems
_NUMBER_OF_CODE = {code: number for number, code in SCALARS.items()}


@dataclass(frozen=True)
class Typed:
    """A value whose GGUF type is not the one its Python type gets: Typed("i", 40) is an int32.

    Attributes:
        code: a struct code of `reader.SCALARS`.
    """

    code: str
    value: Any


Scalar = str | bytes | bool | int | float | Typed
Value = Scalar | Sequence[str] | Sequence[bytes] | Sequence[int] | Sequence[float] | Sequence[bool]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written.

    Attributes:
        shape: in numpy order.
    """

    name: str
    shape: tuple[int, ...]
    block_type: BlockType

    @property
    def size_bytes(self) -> int:
        return self.block_type.tensor_bytes(self.shape)


class GGUFFile:
    """An open output file that expects the bytes of its tensors, in order."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)

    def end_tensor(self, spec: TensorSpec) -> int:
        """Pad after the last byte of a tensor; returns how many bytes that took."""
        return self._file.write(bytes(-spec.size_bytes % DEFAULT_ALIGNMENT))


def header_bytes(metadata: Mapping[str, Value], tensors: Sequence[TensorSpec]) -> bytes:
    """Everything before the weights, padded."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(key, value)]
    offset = 0
    for spec in tensors:
        shape = spec.shape[::-1]
        parts += [_string(spec.name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts.append(struct.pack("<IQ", spec.block_type.number, offset))
        offset += _padded(spec.size_bytes)
    header = b"".join(parts)
    return header + bytes(-len(header) % DEFAULT_ALIGNMENT)


def file_size(header: bytes, tensors: Sequence[TensorSpec]) -> int:
    """Bytes of the whole file."""
    return len(header) + sum(_padded(spec.size_bytes) for spec in tensors)


def check_output(path: Path, size: int, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse early what would fail late.

    Args:
        inputs: files that are read for this one, which it must not replace.

    Raises:
        OutputExistsError: `path` is there and `force` is not given.
        WriteError: no such folder, or `path` is one, or a device, or one of the inputs.
        DiskFullError: fewer than `size` bytes are free.
    """
    if path.is_dir():
        raise WriteError(f"{path}: is a folder", hint="Name a file.")
    path = _resolved(path)
    if path.exists() and not path.is_file():
        raise WriteError(f"{path}: is a device or a pipe, not a file", hint="Name a file.")
    if path.exists() and (same := [other for other in inputs if other.exists() and path.samefile(other)]):
        raise WriteError(f"{path}: is {same[0]}, which is read for it", hint="Name another file.")
    if not path.parent.is_dir():
        raise WriteError(f"{path}: there is no folder {path.parent}", hint=f"Make it: mkdir -p {path.parent}")
    if path.exists() and not force:
        raise OutputExistsError(f"{path}: already exists", hint="Choose another name, or overwrite it with --force.")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise DiskFullError(
            f"{path}: needs {size:,} bytes, {free:,} are free there",
            hint="Free some space, choose another disk, or a smaller quantization.",
        )


@contextmanager
def create(path: Path, header: bytes) -> Iterator[GGUFFile]:
    """Write a file; on any failure nothing is left behind.

    Raises:
        DiskFullError: the disk, a quota or a file size limit is full.
        WriteError: any other failure to write.
    """
    target, is_ours = _resolved(path), False
    partial = target.with_name(f"{target.name}.{secrets.token_hex(6)}.partial")
    try:
        with open(partial, "xb") as file:
            is_ours = True
            file.write(header)
            yield GGUFFile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        if is_ours:
            partial.unlink(missing_ok=True)


def _resolved(path: Path) -> Path:
    """What links lead to.

    Raises:
        WriteError: they lead in a circle.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise WriteError(f"{path}: its links lead nowhere ({error})") from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _write_error(path: Path, error: OSError) -> ConversionError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(
            f"{path}: the disk filled up while writing ({error.strerror}); nothing was left behind",
            hint="Free some space, choose another disk, or a smaller quantization.",
        )
    return WriteError(f"{path}: cannot be written ({error.strerror or error})")


def _padded(size: int) -> int:
    return size + -size % DEFAULT_ALIGNMENT


def _string(text: str | bytes) -> bytes:
    data = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Value) -> bytes:
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, Sequence):
        return struct.pack("<I", ARRAY) + _array(key, value)
    code, number = _typed(key, value)
    return struct.pack("<I" + code, _NUMBER_OF_CODE[code], number)


def _array(key: str, values: Sequence[Any]) -> bytes:
    if not values:
        raise WriteError(f"metadata {key}: an empty list has no type in GGUF")
    if all(isinstance(value, (str, bytes)) for value in values):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_string, values))
    # Python ints become int32 in arrays and uint32 alone, as gguf's own writer does.
    code = "?" if isinstance(values[0], bool) else "i" if isinstance(values[0], int) else "f"
    expected = {"?": bool, "i": int, "f": float}[code]
    if any(type(value) is not expected for value in values):
        raise WriteError(f"metadata {key}: its items are not all {expected.__name__}")
    return struct.pack("<IQ", _NUMBER_OF_CODE[code], len(values)) + struct.pack(f"<{len(values)}{code}", *values)


def _typed(key: str, value: Scalar) -> tuple[str, Any]:
    if isinstance(value, Typed):
        return value.code, value.value
    if isinstance(value, bool):
        return "?", value
    if isinstance(value, float):
        return "f", value
    if isinstance(value, int):
        return ("I" if 0 <= value < 2**32 else "q"), value
    raise WriteError(f"metadata {key}: {type(value).__name__} has no GGUF type")
