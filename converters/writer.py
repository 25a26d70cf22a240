"""Writing a GGUF file, or one in several parts: whole under its final name, or not at all.

The header is written first, then each tensor's bytes as they come, so nothing is held in memory and there is no
intermediate file. The work goes to `NAME.RANDOM.partial` beside the target (behind a link, beside what it points to);
it is flushed to disk and renamed at the end. Of several parts the first gets its name last: without it the others are
no model to anybody.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from converters.errors import ConversionError, DiskFullError, OutputExistsError, WriteError
from converters.quant_types import BlockType
from converters.reader import ARRAY, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING, RawValue

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
Value = Scalar | RawValue | Sequence[str] | Sequence[bytes] | Sequence[int] | Sequence[float] | Sequence[bool]


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


@dataclass(frozen=True)
class Part:
    """One file to be written: the only one, or one of several.

    Attributes:
        specs: its tensors. They say where one part ends and the next begins; the last needs none.
    """

    path: Path
    header: bytes = field(repr=False)
    specs: Sequence[TensorSpec] = ()
    alignment: int = DEFAULT_ALIGNMENT

    @property
    def size_bytes(self) -> int:
        return file_size(self.header, self.specs, self.alignment)


class GGUFFile:
    """Open output that expects the bytes of its tensors, in order, part after part."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._targets = [_resolved(part.path) for part in parts]
        self._partials: list[Path] = []
        self._file: BinaryIO | None = None
        self._ended = 0

    def write(self, data: bytes | memoryview) -> None:
        self._open.write(data)

    def end_tensor(self, spec: TensorSpec) -> int:
        """Pad after the last byte of a tensor; returns how many bytes that took, with the header of a next part."""
        part = self._parts[len(self._partials) - 1]
        count = self._open.write(bytes(-spec.size_bytes % part.alignment))
        self._ended += 1
        if self._ended == len(part.specs) and len(self._partials) < len(self._parts):
            return count + self._begin()
        return count

    @property
    def _open(self) -> BinaryIO:
        assert self._file is not None
        return self._file

    def _begin(self) -> int:
        """Begin the next part."""
        self._flush()
        number = len(self._partials)
        partial = _partial(self._targets[number])
        self._file = open(partial, "xb")  # noqa: SIM115
        self._partials.append(partial)
        self._ended = 0
        return self._file.write(self._parts[number].header)

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _publish(self) -> None:
        """Give every part its name, the first last: then all of them are there."""
        self._flush()
        first, *others = zip(self._partials, self._targets, strict=True)
        named: list[Path] = []
        try:
            if others:
                first[1].unlink(missing_ok=True)  # an older first part beside newer others would be a mixture
            for partial, target in others:
                os.replace(partial, target)
                named.append(target)
            for folder in {target.parent for target in named}:
                _sync_folder(folder)
            os.replace(*first)
        except BaseException:
            for target in named:
                target.unlink(missing_ok=True)
            raise
        _sync_folder(first[1].parent)

    def _clean_up(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what was not written yet does not fit either
                self._file.close()
        for partial in self._partials:
            partial.unlink(missing_ok=True)


def header_bytes(
    metadata: Mapping[str, Value], tensors: Sequence[TensorSpec], alignment: int = DEFAULT_ALIGNMENT
) -> bytes:
    """Everything before the weights, padded.

    Args:
        alignment: what `general.alignment` in `metadata` says, if it is there.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(key, value)]
    offset = 0
    for spec in tensors:
        shape = spec.shape[::-1]
        parts += [_string(spec.name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts.append(struct.pack("<IQ", spec.block_type.number, offset))
        offset += _padded(spec.size_bytes, alignment)
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def file_size(header: bytes, tensors: Sequence[TensorSpec], alignment: int = DEFAULT_ALIGNMENT) -> int:
    """Bytes of the whole file."""
    return len(header) + sum(_padded(spec.size_bytes, alignment) for spec in tensors)


def check_output(path: Path, size: int, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse early what would fail late.

    Args:
        inputs: files that are read for this one, which it must not replace.

    Raises:
        OutputExistsError: `path` is there and `force` is not given.
        WriteError: no such folder, or `path` is one, or a device, or one of the inputs, or its name is too long.
        DiskFullError: fewer than `size` bytes are free.
    """
    if os.path.isdir(path):
        raise WriteError(f"{path}: is a folder", hint="Name a file.")
    path = _resolved(path)
    is_there = os.path.exists(path)  # unlike Path.exists, also false of a name that is too long
    if is_there and not path.is_file():
        raise WriteError(f"{path}: is a device or a pipe, not a file", hint="Name a file.")
    if is_there and (same := [other for other in inputs if other.exists() and path.samefile(other)]):
        raise WriteError(f"{path}: is {same[0]}, which is read for it", hint="Name another file.")
    if not os.path.isdir(path.parent):
        raise WriteError(f"{path}: there is no folder {path.parent}", hint=f"Make it: mkdir -p {path.parent}")
    _check_name(path)
    if is_there and not force:
        raise OutputExistsError(f"{path}: already exists", hint="Choose another name, or overwrite it with --force.")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise DiskFullError(
            f"{path}: needs {size:,} bytes, {free:,} are free there",
            hint="Free some space, choose another disk, or a smaller quantization.",
        )


def _check_name(path: Path) -> None:
    """Raises:
    WriteError: the name is too long for this disk, with the ending that it has while it is written.
    """
    try:
        os.lstat(_partial(path))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror})", hint="Choose another name.") from None


def _partial(target: Path) -> Path:
    """A new name beside it, for as long as it is not whole."""
    return target.with_name(f"{target.name}.{secrets.token_hex(6)}.partial")


@contextlib.contextmanager
def create(path: Path, header: bytes) -> Iterator[GGUFFile]:
    """Write a file; on any failure nothing is left behind.

    Raises:
        DiskFullError: the disk, a quota or a file size limit is full.
        WriteError: any other failure to write.
    """
    with create_parts([Part(path, header)]) as file:
        yield file


@contextlib.contextmanager
def create_parts(parts: Sequence[Part]) -> Iterator[GGUFFile]:
    """Write a file in several parts: all of them appear, or none.

    Raises:
        DiskFullError: the disk, a quota or a file size limit is full.
        WriteError: any other failure to write.
    """
    file = GGUFFile(parts)
    try:
        file._begin()
        yield file
        file._publish()
    except OSError as error:
        raise _write_error(parts[0].path, error) from error
    finally:
        file._clean_up()


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


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment


def _string(text: str | bytes) -> bytes:
    data = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Value) -> bytes:
    if isinstance(value, RawValue):
        inner = struct.pack("<IQ", value.item_kind, value.count) if value.kind == ARRAY else b""
        return struct.pack("<I", value.kind) + inner + value.data
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
