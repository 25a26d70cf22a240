"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file to be written in the block: beside its place, onto the disk, and only at the block's good end does it get
    its name, for good. In another's place it keeps that one's owner, where this process may give files away.

    Args:
        mode: of the file, less what the process masks.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            with suppress(OSError, AttributeError):  # nothing to take the place of, not ours to give, or Windows
                old = path.stat()
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_whole(path: Path, text: str, mode: int = 0o666) -> None:
    """`whole_file` for a text, in UTF-8."""
    with whole_file(path, mode) as file:
        file.write(text.encode())


def _sync_folder(folder: Path) -> None:
    """Onto the disk with the name as well: what was replaced must not come back with the power."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders, and looks after them itself
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
