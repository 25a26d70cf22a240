"""The output of a batch: a JSONL file that only grows, by whole rows, and survives kill -9 at any moment.

A row is one `write` of a line. A line that a crash cut off has no newline and is dropped when the file is opened again;
rows before it are never touched. The file is synced to disk every few seconds and at the end. A lock beside it keeps a
second process out while the first is alive.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from filelock import FileLock, Timeout

from edgelora.errors import DataFileError

SYNC_SECONDS = 5.0
ROW_STARTS = (b'{"id": ', b'{"line": ')  # every row begins with what names it
AGAIN = "Free some space and run the same command again: it goes on where this one ended."


class Results(Protocol):
    """Where result rows go."""

    def rows(self) -> Iterator[Mapping[str, Any]]: ...
    def rewrite(self, keep: Callable[[Mapping[str, Any]], bool]) -> None: ...
    def append(self, row: Mapping[str, Any]) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_results(output: Path | str) -> Results:
    """A file that can be resumed; for `-` (standard output), pipes and devices a plain stream.

    Raises:
        DataFileError: it cannot be opened, or another process is writing it.
    """
    if str(output) == "-":
        return StreamResults(sys.stdout.buffer, "standard output")
    path = Path(output)
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe or a device
        return StreamResults(_open(path, "wb"), str(path))
    return ResultFile(path)


def _open(path: Path, mode: str) -> IO[bytes]:
    try:
        return open(path, mode, buffering=0)
    except OSError as error:
        raise DataFileError(f"{path}: cannot be written ({error.strerror})") from None


def encode(row: Mapping[str, Any]) -> bytes:
    """The row as a line. A lone surrogate, which JSON can carry and UTF-8 cannot, stays escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode("utf-8")


class StreamResults:
    """Rows to a stream, flushed one by one; nothing can be resumed."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name, self._written = stream, name, 0

    def rows(self) -> Iterator[Mapping[str, Any]]:
        return iter(())

    def rewrite(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Nothing was written before."""

    def append(self, row: Mapping[str, Any]) -> None:
        try:
            self._stream.write(encode(row))
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise DataFileError(f"{self._name}: {error.strerror} after {self._written} rows") from None
        self._written += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not sys.stdout.buffer:
            self._stream.close()


class ResultFile:
    """Rows in a file that an earlier run may have begun.

    Raises:
        DataFileError: it cannot be opened, or another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir() or not path.parent.is_dir():
            problem = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise DataFileError(f"{path}: cannot be written ({problem})")
        self._lock = FileLock(f"{path}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise DataFileError(
                f"{path}: another process is writing it", hint="Wait for it to end, or name another output with -o."
            ) from None
        except OSError as error:
            raise DataFileError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._file = _open(path, "ab+")
        except BaseException:
            self._unlock()
            raise
        try:
            self._refuse_foreign()
            self._size = self._drop_torn_line()
        except BaseException:
            self._file.close()
            self._unlock()
            raise
        self._written = 0
        self._synced = time.monotonic()

    def _refuse_foreign(self) -> None:
        """Nothing is cut off a file that no batch began, also where it has no whole line."""
        self._file.seek(0)
        start = self._file.read(len(ROW_STARTS[-1]))
        if not any(start.startswith(row[: len(start)]) for row in ROW_STARTS):
            raise self._foreign(1)

    def _foreign(self, line: int) -> DataFileError:
        return DataFileError(
            f"{self.path}:{line}: not a row of a batch output; it is left as it is",
            hint="Name another output with -o.",
        )

    def _drop_torn_line(self) -> int:
        """Cut off what follows the last newline; the size of what is left."""
        position = self._file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            position = start + newline + 1
            if newline >= 0:
                break
        self._file.truncate(position)
        return position

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """What the file holds.

        Raises:
            DataFileError: a line that is no JSON object: this is not a batch output.
        """
        with _open(self.path, "rb") as file:
            for line, raw in enumerate(_lines(file), start=1):
                try:
                    row = json.loads(raw)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise self._foreign(line)
                yield row

    def rewrite(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the rows that are not kept. The file is replaced whole, or not at all."""
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                for row in self.rows():
                    if keep(row):
                        file.write(encode(row))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DataFileError(f"{partial}: {error.strerror}; {self.path} is as it was", hint=AGAIN) from None
        self._file.close()
        self._file = _open(self.path, "ab+")
        self._size = self._file.seek(0, os.SEEK_END)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row.

        Raises:
            DataFileError: the disk is full or gone; whole rows stay, a part of one does not.
        """
        data = encode(row)
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
            self._size += len(data)
            self._written += 1
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()
        except OSError as error:
            self._file.truncate(self._size)
            raise DataFileError(
                f"{self.path}: {error.strerror} after {self._written} rows of this run; every whole row is kept",
                hint=AGAIN,
            ) from None

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _unlock(self) -> None:
        # While the lock is held: filelock refuses a lock file that was unlinked under it, so no two processes get in.
        Path(f"{self.path}.lock").unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._sync()
            self._file.close()
        except OSError as failure:
            raise DataFileError(f"{self.path}: {failure.strerror}", hint=AGAIN) from None
        finally:
            self._unlock()


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of an unbuffered file."""
    rest = b""
    while data := file.read(1 << 20):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest
