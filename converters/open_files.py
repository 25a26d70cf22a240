"""Files that stay open while rows of them are read.

Everything is read with `pread`, so memory does not grow with the model (mapped pages would count as resident), and any
number of threads may read at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from converters.errors import MissingFileError, TruncatedFileError


class OpenFiles:
    """A context manager: it opens them, and closes them.

    Raises:
        MissingFileError: one that cannot be opened.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = sorted(set(files))
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Self:
        try:
            for path in self.files:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
        except OSError as error:
            self.__exit__(None, None, None)
            raise MissingFileError(f"{error.filename}: cannot be read ({error.strerror})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def bytes_of(self, path: Path, tensor: str, offset: int, count: int, *, hint: str) -> bytes:
        """Bytes of one of the files.

        Args:
            tensor: the one that they belong to, and `hint` what to do where they are not there, for the error.

        Raises:
            TruncatedFileError: the file has become shorter since its header was read.
            MissingFileError: it cannot be read any more.
        """
        descriptor, pieces = self._descriptors[path], []
        while count:
            try:
                piece = os.pread(descriptor, count, offset)  # one call gives at most 2 GiB
            except OSError as error:
                raise MissingFileError(f"{path}: cannot be read ({error.strerror})") from None
            if not piece:
                raise TruncatedFileError(f"{path}: ends inside tensor {tensor}", hint=hint)
            pieces.append(piece)
            offset, count = offset + len(piece), count - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
