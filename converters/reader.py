"""The header of a GGUF file, read with care: stdlib only, and nothing in it is believed before it is checked.

A file may come from a stranger, and llama.cpp ends the process on some that lie, so every count, length and offset is
compared with the size of the file before anything is allocated. Values are decoded when they are asked for: a
vocabulary of 150,000 tokens stays raw bytes unless somebody wants its words.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.errors import FormatError, MissingFileError, TruncatedFileError
from converters.quant_types import TYPE_BY_NUMBER

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_TENSOR_NAME = 63
STRING, ARRAY = 8, 9
# GGUF value type to its struct code; strings and arrays have none.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        shape: in numpy order, the row length last (the file holds the reverse).
        type_name: a key of `quant_types.TYPES`.
        offset: from the start of the file, in bytes.
        path: the file: a base may lie in several.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    size_bytes: int
    path: Path


@dataclass(frozen=True)
class RawValue:
    """A value as it lies in the file: its type, the type and number of its items if it is an array, and its bytes."""

    kind: int
    item_kind: int
    count: int
    data: bytes

    def decode(self) -> Any:
        if self.kind == STRING:
            return self.data[8:].decode("utf-8", errors="replace")
        if self.kind != ARRAY:
            return struct.unpack("<" + SCALARS[self.kind], self.data)[0]
        if self.item_kind == STRING:
            return list(self._strings())
        return list(struct.unpack(f"<{self.count}{SCALARS[self.item_kind]}", self.data))

    def _strings(self) -> Iterator[str]:
        position = 0
        for _ in range(self.count):
            (length,) = struct.unpack_from("<Q", self.data, position)
            position += 8 + length
            yield self.data[position - length : position].decode("utf-8", errors="replace")


class Metadata(Mapping[str, Any]):
    """Key to value; each is decoded at its first use and kept."""

    def __init__(self, raw: dict[str, RawValue]) -> None:
        self._raw = raw
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            self._decoded[key] = self._raw[key].decode()
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def __contains__(self, key: object) -> bool:
        return key in self._raw

    def raw(self, key: str) -> RawValue:
        """The value's bytes, not decoded; arrays without their type and count."""
        return self._raw[key]


@dataclass(frozen=True)
class GGUFHeader:
    """What a file says before its weights begin.

    Attributes:
        size_bytes: of the file; of all of them where the base is split (`base_file.read_base_header`).
        files: all of them, `path` first.
    """

    path: Path
    version: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    size_bytes: int
    files: tuple[Path, ...]

    @property
    def kind(self) -> str:
        """ "adapter" or "base"."""
        is_adapter = self.metadata.get("general.type") == "adapter" or "adapter.type" in self.metadata
        return "adapter" if is_adapter else "base"

    @property
    def architecture(self) -> str:
        """`general.architecture`.

        Raises:
            FormatError: the file does not say.
        """
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise FormatError(f"{self.path}: general.architecture is missing: this GGUF does not say what model it is")
        return name

    @property
    def alignment(self) -> int:
        """Every tensor begins at a multiple of so many bytes."""
        return int(self.metadata.get("general.alignment", DEFAULT_ALIGNMENT))


def read_header(path: Path | str) -> GGUFHeader:
    """Read and check everything but the weights of one file.

    Raises:
        MissingFileError: no such file, or not readable.
        FormatError: not a GGUF file, or one whose header contradicts itself.
        TruncatedFileError: the header or the weights end early.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                file.seek(0)
                _check_magic(path, file.read(24), size)
                raise TruncatedFileError(f"{path}: {size} bytes is too short for a GGUF file", hint=_AGAIN)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data, size).parse()
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror or error})") from None


_AGAIN = "Download or convert it again."


def _check_magic(path: Path, start: bytes, size: int) -> None:
    if start[:4] != MAGIC:
        raise FormatError(f"{path}: not a GGUF file (it starts with {start[:4]!r}, expected {MAGIC!r}; {size} bytes)")


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.position = path, data, size, 0

    def parse(self) -> GGUFHeader:
        _check_magic(self.path, self.data[:4], self.size)
        self.position = 4
        version = self.scalar("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "a big-endian file" if swapped in VERSIONS else f"version {version}"
            raise FormatError(f"{self.path}: {what}; little-endian GGUF versions 2 and 3 can be read")
        n_tensors, n_pairs = self.scalar("Q"), self.scalar("Q")
        self.fits(n_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        self.fits(n_pairs, 8 + 4 + 1, "metadata entries")
        metadata = Metadata(dict(self.pairs(n_pairs)))
        infos = [self.tensor_info() for _ in range(n_tensors)]
        tensors = self.place(infos, self.alignment(metadata))
        return GGUFHeader(self.path, version, metadata, tensors, self.size, (self.path,))

    # Every read goes through these two.

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise TruncatedFileError(
                f"{self.path}: ends inside its header ({what} needs {count} bytes at byte {self.position}, "
                f"the file has {self.size})",
                hint=_AGAIN,
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def fits(self, count: int, least: int, what: str) -> None:
        if count * least > self.size - self.position:
            raise TruncatedFileError(
                f"{self.path}: says it holds {count} {what} from byte {self.position} on, more than its {self.size} "
                "bytes can hold",
                hint=_AGAIN,
            )

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), "a number"))[0]

    def string(self, what: str) -> str:
        data = self.take(self.scalar("Q"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.path}: {what} at byte {self.position - len(data)} is not UTF-8") from None

    def pairs(self, count: int) -> Iterator[tuple[str, RawValue]]:
        seen = set()
        for _ in range(count):
            key = self.string("a metadata key")
            if key in seen:
                raise FormatError(f"{self.path}: metadata key {key!r} occurs twice")
            seen.add(key)
            yield key, self.value(key, self.scalar("I"))

    def value(self, key: str, kind: int) -> RawValue:
        if kind == ARRAY:
            return self.array(key)
        if kind == STRING:
            return RawValue(kind, 0, 1, self.counted_strings(1, key))
        if kind not in SCALARS:
            raise FormatError(f"{self.path}: metadata key {key!r} has unknown type {kind}")
        return RawValue(kind, 0, 1, self.take(struct.calcsize("<" + SCALARS[kind]), key))

    def array(self, key: str) -> RawValue:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == STRING:
            self.fits(count, 8, f"strings in {key}")
            return RawValue(ARRAY, kind, count, self.counted_strings(count, key))
        if kind not in SCALARS:
            raise FormatError(f"{self.path}: metadata key {key!r} is an array of unknown type {kind}")
        return RawValue(ARRAY, kind, count, self.take(count * struct.calcsize("<" + SCALARS[kind]), key))

    def counted_strings(self, count: int, key: str) -> bytes:
        """The raw bytes of `count` strings, each a length and its characters; only the lengths are looked at."""
        start, data, unpack = self.position, self.data, struct.Struct("<Q").unpack_from
        position, last = start, self.size - 8
        for _ in range(count):
            if position > last:
                break
            position += 8 + unpack(data, position)[0]
        else:
            return self.take(position - start, key)
        raise TruncatedFileError(f"{self.path}: ends inside its header (the value of {key})", hint=_AGAIN)

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor name")
        n_dims = self.scalar("I")
        if not 1 <= n_dims <= MAX_DIMENSIONS or not 1 <= len(name.encode()) <= MAX_TENSOR_NAME:
            raise FormatError(f"{self.path}: tensor {name[:80]!r} with {n_dims} dimensions is not valid")
        shape = tuple(self.scalar("Q") for _ in range(n_dims))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def alignment(self, metadata: Metadata) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise FormatError(f"{self.path}: general.alignment is {alignment!r}, expected a power of two, 8 or more")
        return alignment

    def place(self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, TensorInfo]:
        """Names to tensors. Weights must lie one after the other, padded, as llama.cpp demands: so none overlap."""
        start = _padded(self.position, alignment)
        expected, tensors = 0, {}
        for name, shape, number, offset in infos:
            size = self.tensor_size(name, shape, number)
            if name in tensors:
                raise FormatError(f"{self.path}: tensor {name} occurs twice")
            if offset != expected:
                raise FormatError(f"{self.path}: tensor {name} is at offset {offset}, expected {expected}")
            tensors[name] = TensorInfo(name, shape, TYPE_BY_NUMBER[number].name, start + offset, size, self.path)
            expected = _padded(offset + size, alignment)
        end = max((t.offset + t.size_bytes for t in tensors.values()), default=0)
        if end > self.size:
            raise TruncatedFileError(
                f"{self.path}: has {self.size} bytes, its weights need {end} ({end - self.size} are missing)",
                hint=_AGAIN,
            )
        return tensors

    def tensor_size(self, name: str, shape: tuple[int, ...], number: int) -> int:
        block_type = TYPE_BY_NUMBER.get(number)
        if block_type is None:
            raise FormatError(f"{self.path}: tensor {name} has unknown type {number}")
        if min(shape) < 1 or prod(shape) >= 2**63 or shape[-1] % block_type.block:
            raise FormatError(f"{self.path}: tensor {name} cannot have shape {shape} and type {block_type.name}")
        return block_type.tensor_bytes(shape)


def _padded(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment
