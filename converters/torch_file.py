"""A state dict that `torch.save` wrote (`adapter_model.bin`), read without torch and without executing anything.

A zip file, whose members are stored as they are, so that most tensors can be read where they lie:

    adapter_model/data.pkl      a pickle: names, shapes, and which storage each tensor is a view of
    adapter_model/byteorder     "little"
    adapter_model/data/0        the numbers of the first storage
    adapter_model/data/1        ...

Format: torch/serialization.py and caffe2/serialize/inline_container.cc, https://github.com/pytorch/pytorch.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from converters.checkpoint import Bytes, Tensors
from converters.errors import (
    FormatError,
    MissingFileError,
    TruncatedFileError,
    UnsupportedError,
    listed,
)
from converters.safetensors_file import ITEM_BITS, StoredTensor
from converters.shards import DTYPES, Floats, floats, matrix_of
from converters.torch_pickle import read_pickle
from converters.torch_tensors import BrokenPickleError, ForbiddenError, PickledTensor, Storage

MAX_DIRECTORY_BYTES = 16_000_000  # of the zip file: some 200,000 members
MAX_PICKLE_BYTES = 64_000_000
# What zipfile raises for a directory that makes no sense.
BROKEN_ZIP = (
    zipfile.BadZipFile, NotImplementedError, ValueError, LookupError, ArithmeticError, struct.error, EOFError, OSError,
)  # fmt: skip
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and of what else comes before the member
SAFE = "Save it as safetensors: model.save_pretrained(folder, safe_serialization=True)."
AGAIN = "Download the file again."
# Files of other kinds by how they begin, and what they are.
OLD = "as torch before 1.6 wrote it (or with _use_new_zipfile_serialization=False)"
BEGINNINGS: Mapping[bytes, str] = {
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": f"is a pickle {OLD}",
    b"\x80": "is a bare pickle, and not what torch.save writes",
}


@dataclass(frozen=True)
class StridedTensor(StoredTensor):
    """A view whose numbers do not lie one after the other; `offset` and `size_bytes` are of those it spans.

    Attributes:
        strides: in numbers, one for each dimension.
    """

    strides: tuple[int, ...]


class TorchTensors(Tensors):
    """Tensors of such a file; `rows` of a view that is not contiguous reads all that it spans."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        tensor = self.tensors[name]
        if not isinstance(tensor, StridedTensor):
            return super().rows(name, start, stop)
        self.check_dtypes([name])
        stop = matrix_of(tensor.shape)[0] if stop is None else stop
        numbers = self._gathered(tensor)[start:stop].view(DTYPES[tensor.dtype][0])
        return floats(numbers, tensor.dtype)

    def raw_rows(self, name: str, start: int, stop: int, row_bytes: int) -> Bytes:
        tensor = self.tensors[name]
        if not isinstance(tensor, StridedTensor):
            return super().raw_rows(name, start, stop, row_bytes)
        return self._gathered(tensor).view(np.uint8).reshape(-1, row_bytes)[start:stop]

    def _gathered(self, tensor: StridedTensor) -> npt.NDArray[Any]:
        """The whole tensor as a matrix, its numbers as unsigned ones, in the order of its own dimensions."""
        item_bytes = ITEM_BITS[tensor.dtype] // 8
        spanned = np.frombuffer(self._shards.read(tensor, 0, tensor.size_bytes), f"<u{item_bytes}")
        steps = tuple(stride * item_bytes for stride in tensor.strides)
        view = as_strided(spanned, tensor.shape, steps, writeable=False)
        return np.ascontiguousarray(view).reshape(matrix_of(tensor.shape))


def read_torch_file(path: Path) -> TorchTensors:
    """The tensors of a state dict; nothing that the file holds is imported or called.

    Raises:
        MissingFileError: no such file, or not readable.
        FormatError: not such a file, or one that contradicts itself; TruncatedFileError if its end is missing.
        UnsupportedError: it holds more than tensors (code, say), or was written in another format of torch's.
    """
    try:
        with open(path, "rb") as file:
            _check_beginning(path, file)
            members = _members(path, file)
            prefix = _prefix(path, members)
            tensors = _tensors(path, file, members, prefix)
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    return TorchTensors(tensors)


def _check_beginning(path: Path, file: BinaryIO) -> None:
    start = file.read(262)
    if start.startswith(b"PK\x03\x04"):
        return
    if start.startswith(b"version "):
        raise FormatError(f"{path}: a Git LFS pointer, not the weights", hint="Fetch them with `git lfs pull`.")
    if start[257:] == b"ustar":
        raise UnsupportedError(f"{path}: is a tar file {OLD}", hint=SAFE)
    for beginning, what in BEGINNINGS.items():
        if start.startswith(beginning):
            raise UnsupportedError(f"{path}: {what}", hint=SAFE)
    if not start:
        raise TruncatedFileError(f"{path}: is empty", hint=AGAIN)
    raise FormatError(f"{path}: not a file of torch.save (it starts with {start[:8]!r})")


@dataclass(frozen=True)
class _Member:
    offset: int
    size_bytes: int
    checksum: int


class _Bounded(io.BufferedReader):
    """A file of which no one reads much at a time: a zip file's directory may claim any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory has {size} bytes")
        return super().read(size)


def _members(path: Path, file: BinaryIO) -> dict[str, _Member]:
    """Places of a zip file's members.

    Raises:
        FormatError: the directory is broken, or places members outside of the file, or two of one name.
        UnsupportedError: compressed or encrypted members.
    """
    file_size = file.seek(0, io.SEEK_END)
    entries = _directory(path)
    if twice := [name for name, count in Counter(entry.filename for entry in entries).items() if count > 1]:
        raise FormatError(f"{path}: has more than one member{listed(twice)}")
    if packed := [entry.filename for entry in entries if entry.compress_type or entry.flag_bits & 1]:
        raise UnsupportedError(f"{path}: has compressed members, where torch stores them as they are:{listed(packed)}")
    return {entry.filename: _member(path, file, entry, file_size) for entry in entries}


def _directory(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with _Bounded(io.FileIO(path)) as bounded, zipfile.ZipFile(bounded) as archive:
            return archive.infolist()
    except BROKEN_ZIP as error:
        raise TruncatedFileError(
            f"{path}: is not complete, or damaged: the directory at its end cannot be read ({error})", hint=AGAIN
        ) from None


def _member(path: Path, file: BinaryIO, entry: zipfile.ZipInfo, file_size: int) -> _Member:
    start = entry.header_offset + LOCAL_HEADER.size
    if entry.header_offset >= 0 and start <= file_size and entry.file_size == entry.compress_size:
        file.seek(entry.header_offset)
        signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        offset = start + name_bytes + extra_bytes
        if signature == b"PK\x03\x04" and offset + entry.file_size <= file_size:
            return _Member(offset, entry.file_size, entry.CRC)
    raise FormatError(f"{path}: its directory says of {entry.filename} what cannot be", hint=AGAIN)


def _prefix(path: Path, members: Mapping[str, _Member]) -> str:
    """The folder in the zip file that everything lies in, with its slash."""
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise FormatError(f"{path}: a zip file, and not one that torch.save wrote")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in members:
        raise UnsupportedError(f"{path}: is a TorchScript program", hint=SAFE)
    return prefix


def _tensors(path: Path, file: BinaryIO, members: Mapping[str, _Member], prefix: str) -> dict[str, StoredTensor]:
    if (order := members.get(f"{prefix}byteorder")) and _content(path, file, order, "byteorder", 16) != b"little":
        raise UnsupportedError(f"{path}: was written on a machine of another byte order", hint=SAFE)
    data = _content(path, file, members[f"{prefix}data.pkl"], "data.pkl", MAX_PICKLE_BYTES)
    try:
        pickled = read_pickle(data)
        for storage in {tensor.storage for tensor in pickled.values()}:
            _check_storage(storage, members.get(f"{prefix}data/{storage.key}"))
    except ForbiddenError as problem:
        raise UnsupportedError(f"{path}: {problem}", hint=SAFE) from None
    except BrokenPickleError as problem:
        raise FormatError(f"{path}: {problem}", hint=AGAIN) from None
    return {
        name: _stored(path, name, tensor, members[f"{prefix}data/{tensor.storage.key}"])
        for name, tensor in pickled.items()
    }


def _content(path: Path, file: BinaryIO, member: _Member, name: str, most: int) -> bytes:
    """A small member; its checksum is compared where torch wrote one (it need not)."""
    if member.size_bytes > most:
        raise FormatError(f"{path}: {name} has {member.size_bytes} bytes, more than {most}")
    file.seek(member.offset)
    data = file.read(member.size_bytes)
    if member.checksum and zlib.crc32(data) != member.checksum:
        raise FormatError(f"{path}: is damaged: {name} and its checksum do not agree", hint=AGAIN)
    return data


def _check_storage(storage: Storage, member: _Member | None) -> None:
    if member is None:
        raise BrokenPickleError(f"has no storage data/{storage.key:.80}")
    if member.size_bytes != storage.size_bytes:
        raise BrokenPickleError(
            f"storage data/{storage.key:.80} has {member.size_bytes} bytes, the pickle says {storage.size_bytes}"
        )


def _stored(path: Path, name: str, tensor: PickledTensor, member: _Member) -> StoredTensor:
    offset, size = member.offset + tensor.offset * tensor.item_bytes, tensor.span * tensor.item_bytes
    place = (name, tensor.dtype, tensor.shape, path, offset, size)
    return StoredTensor(*place) if tensor.is_contiguous else StridedTensor(*place, tensor.strides)
