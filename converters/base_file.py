"""A GGUF base to read from: one file, or all parts of a split one as if they were one file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from converters.block_types import TYPES
from converters.dequantize import dequantize_rows
from converters.errors import FormatError, MissingFileError, listed
from converters.open_files import OpenFiles
from converters.quantize import Bytes, Floats
from converters.reader import GGUFHeader, TensorInfo, read_header
from converters.split import COUNT, NUMBER, TENSORS, PartName, part_name

_AGAIN = "Download or convert it again."


def read_base_header(path: Path | str) -> GGUFHeader:
    """The header of a base, whichever of its parts is named: metadata of the first part, tensors of all.

    Raises:
        MissingFileError: a part is not there; all that are missing are named.
        FormatError: a part is broken, or the parts contradict one another.
    """
    header = read_header(path)
    count = header.metadata.get(COUNT, 1)
    if type(count) is not int or count in (0, 1):
        return header
    named = part_name(header.path)
    if named is None:
        raise FormatError(
            f"{header.path}: is one of {count} parts of a base ({COUNT}), and its name does not say which",
            hint=f"Rename the parts to NAME-00001-of-{count:05d}.gguf and so on: llama.cpp finds them by that.",
        )
    if named.count != count:
        raise FormatError(f"{header.path}: its name says {named.count} parts, {COUNT} says {count}")
    return _joined(_parts(header, named))


def _parts(header: GGUFHeader, named: PartName) -> list[GGUFHeader]:
    """Headers of all parts, in order."""
    paths = [named.path(number + 1) for number in range(named.count)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise MissingFileError(
            f"{header.path}: {len(missing)} of {named.count} parts are missing:{listed(missing)}",
            hint="They belong into one folder, under the names they were made with.",
        )
    return [header if path == header.path else read_header(path) for path in paths]


def _joined(parts: list[GGUFHeader]) -> GGUFHeader:
    first = parts[0]
    tensors: dict[str, TensorInfo] = {}
    problems = [problem for number, part in enumerate(parts) for problem in _key_problems(number, part, len(parts))]
    for part in parts:
        problems += [f"{part.path.name}: {name} is in another part too" for name in part.tensors if name in tensors]
        tensors |= part.tensors
    if (wanted := first.metadata.get(TENSORS)) != len(tensors):
        problems.append(f"{first.path.name}: {TENSORS} is {wanted}, the parts have {len(tensors)} tensors")
    if problems:
        raise FormatError(f"{first.path}: its parts do not belong together:{listed(problems)}", hint=_AGAIN)
    size = sum(part.size_bytes for part in parts)
    return replace(first, tensors=tensors, size_bytes=size, files=tuple(part.path for part in parts))


def _key_problems(number: int, part: GGUFHeader, count: int) -> Iterator[str]:
    for key, wanted in ((NUMBER, number), (COUNT, count)):
        if (said := part.metadata.get(key)) != wanted:
            yield f"{part.path.name}: {key} is {said}, expected {wanted}"


class BaseFile:
    """An open base: `header` says what there is, `blocks` and `rows` read it. A context manager.

    Raises:
        ConversionError: see `read_base_header`.
    """

    def __init__(self, path: Path | str) -> None:
        self.header = read_base_header(path)
        self._files = OpenFiles(self.header.files)

    def __enter__(self) -> Self:
        self._files.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Rows `start` to `stop` of a tensor as they are, uint8 (stop - start, bytes of a row); a vector is one row.

        Raises:
            TruncatedFileError: the file has become shorter since its header was read.
        """
        tensor = self.header.tensors[name]
        row_bytes = TYPES[tensor.type_name].row_bytes(tensor.shape[-1])
        stop = prod(tensor.shape[:-1]) if stop is None else stop
        offset, count = tensor.offset + start * row_bytes, (stop - start) * row_bytes
        data = self._files.bytes_of(tensor.path, name, offset, count, hint=_AGAIN)
        return np.frombuffer(data, np.uint8).reshape(stop - start, row_bytes)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """The same as float32, (stop - start, row length), bit for bit as llama.cpp reads them.

        Raises:
            UnsupportedError: a type that holds no weights.
        """
        tensor = self.header.tensors[name]
        return dequantize_rows(self.blocks(name, start, stop), TYPES[tensor.type_name], tensor.shape[-1])
