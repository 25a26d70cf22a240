"""Files that are there whole or not at all, whose they were before, and in nobody's way when the writer fails."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from edgelora.whole_file import whole_file, write_whole


def test_a_file_gets_its_name_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.txt").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(tmp_path / "a.txt", "new")
    with suppress(KeyError), whole_file(tmp_path / "a.txt") as file:
        file.write(b"half")
        raise KeyError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_mode_is_that_of_the_file_from_its_first_byte_on(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.txt", mode=0o600) as file:
        assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_file_stays_its_owners(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.txt", "old")
    os.chown(tmp_path / "a.txt", 4321, 8765)
    write_whole(tmp_path / "a.txt", "new")
    found = (tmp_path / "a.txt").stat()
    assert (found.st_uid, found.st_gid) == (4321, 8765)
