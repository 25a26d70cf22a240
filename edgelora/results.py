"""The output of a batch: a JSONL file that only grows, by whole rows, and survives kill -9 at any moment.

A row is one `write` of a line. A line that a crash cut off has no newline and is dropped by the first row that is
written after it; whole rows are never touched, and nothing is in a file that was not asked to be written. The file is
synced to disk every few seconds and at the end. A lock beside it keeps a second process out while the first is alive.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from filelock import FileLock, Timeout

from edgelora.batch_formats import result_of
from edgelora.errors import DataFileError
from edgelora.whole_file import whole_file

SYNC_SECONDS = 5.0
_LABEL = re.compile(rb'\{"(?:id|line)": ')  # every row begins with what names it ...
_BODY = (b', "text": "', b', "error": "', b', "line": ', b', "custom_id": ')  # ... and goes on with what was answered
AGAIN = "Free some space and run the same command again: it goes on where this one ended."


class Results(Protocol):
    """Where result rows go."""

    def rows(self) -> Iterator[Mapping[str, Any]]: ...
    def drop(self, places: Container[int]) -> None: ...
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


def parallel_of(output: Path | str) -> int | None:
    """How many rows each decode had when this output was begun; None where nothing is known of it.

    A batch that goes on should have as many: another number rounds otherwise, and its rows are not mixed with these.
    """
    if not Path(output).is_file():
        return None
    try:
        with open(output, "rb") as file:
            result = result_of(json.loads(file.readline()))
        return int(result.key.rpartition(".")[2]) if result else None
    except (OSError, ValueError, RecursionError):
        return None


class StreamResults:
    """Rows to a stream, flushed one by one; nothing can be resumed."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name, self._written = stream, name, 0

    def rows(self) -> Iterator[Mapping[str, Any]]:
        return iter(())

    def drop(self, places: Container[int]) -> None:
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
        if path.is_dir() or not path.resolve().parent.is_dir():
            problem = "it is a folder" if path.is_dir() else f"there is no folder {path.resolve().parent}"
            raise DataFileError(f"{path}: cannot be written ({problem})")
        self.path = path.resolve()  # a link and its file are one output: one lock, and the link survives a rewrite
        self._lock = FileLock(f"{self.path}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise DataFileError(
                f"{path}: another process is writing it", hint="Wait for it to end, or name another output with -o."
            ) from None
        except OSError as error:
            raise DataFileError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._file = _open(self.path, "ab+")
        except BaseException:
            self._unlock()
            raise
        self._size = self._whole_lines()
        self._written = 0
        self._synced = time.monotonic()

    def _whole_lines(self) -> int:
        """The size of the file without what follows its last newline."""
        position = self._file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            position = start + newline + 1
            if newline >= 0:
                break
        return position

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """The whole rows that the file holds.

        Raises:
            DataFileError: a line that no batch wrote: it is left as it is, whatever was asked for.
        """
        line = 0
        with _open(self.path, "rb") as file:
            for line, raw in enumerate(_lines(file, self._size), start=1):
                yield self._row(raw, line)
            torn = file.read(min(1 << 20, os.fstat(file.fileno()).st_size - self._size))
        if torn and line == 0 and not _begins_row(torn):
            raise self._foreign(1)
        try:
            json.loads(torn)
        except (ValueError, RecursionError):
            return
        self._row(torn, line + 1)  # not torn, only without its newline

    def _row(self, raw: bytes, line: int) -> Mapping[str, Any]:
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or result_of(row) is None:
            raise self._foreign(line)
        return row

    def _foreign(self, line: int) -> DataFileError:
        return DataFileError(
            f"{self.path}:{line}: not a row of a batch output; the file is left as it is",
            hint="Name another output with -o.",
        )

    def drop(self, places: Container[int]) -> None:
        """Drop the rows at these 0-based places. The file is replaced whole, or not at all; its mode stays."""
        try:
            with whole_file(self.path, mode=0o600) as file, _open(self.path, "rb") as old:
                kept = (raw for place, raw in enumerate(_lines(old, self._size)) if place not in places)
                file.writelines(raw + b"\n" for raw in kept)
                shutil.copymode(self.path, file.name)
        except OSError as error:
            raise DataFileError(f"{self.path}: {error.strerror}; it is as it was", hint=AGAIN) from None
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
            if not self._written:
                self._file.truncate(self._size)
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


def _begins_row(torn: bytes) -> bool:
    """Whether this is how a row of a batch output begins."""
    label = _LABEL.match(torn)
    if not label:
        return any(start.startswith(torn) for start in (b'{"id": ', b'{"line": '))
    text = torn[label.end() :].decode("utf-8", errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return True  # cut off inside its id
    rest = text[end:].encode()
    return any(body.startswith(rest) or rest.startswith(body) for body in _BODY)


def _lines(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The lines in the first `size` bytes of an unbuffered file; they end with a newline."""
    rest = b""
    while data := file.read(min(1 << 16, size)):
        size -= len(data)
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
