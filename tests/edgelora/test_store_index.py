"""The index: many writers at once, an older schema, a newer one, a broken file."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from converters.base import convert_base
from converters.detect import SourceKind
from edgelora.entry import Entry
from edgelora.errors import ModelFileError
from edgelora.registration import add
from edgelora.store import Store
from edgelora.store_index import VERSION, WAIT_SECONDS, Index
from tests.conftest import ROOT, TINY_BASE

PROCESSES, FILES_EACH = 4, 10
V1 = """
CREATE TABLE bases (path TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
                    fingerprint TEXT NOT NULL, registered INTEGER NOT NULL DEFAULT 0)
"""
WRITER = """
import sys
from pathlib import Path
from edgelora.entry import Entry
from edgelora.store_index import Index
index, number = Index(Path(sys.argv[1])), int(sys.argv[2])
for n in range(int(sys.argv[3])):
    index.remember([Entry(Path(f"/models/{number}-{n}.gguf"), content=f"{number}-{n}", origin="added")])
    index.entries()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_base(TINY_BASE, tmp_path_factory.mktemp("base") / "tiny-q8_0.gguf", quant="q8_0").path


def write_at_once(folder: Path) -> list[Path]:
    commands = [[sys.executable, "-c", WRITER, str(folder), str(n), str(FILES_EACH)] for n in range(PROCESSES)]
    running = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=4 * WAIT_SECONDS)[1] for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, errors
    return sorted(Index(folder).entries())


def test_processes_that_write_at_once_lose_nothing(own_store: Path) -> None:
    paths = write_at_once(own_store)
    assert len(paths) == PROCESSES * FILES_EACH == len(set(paths))


def test_processes_that_find_a_broken_index_rebuild_it_once(own_store: Path) -> None:
    (own_store / "index.sqlite").write_bytes(b"no database" * 1000)
    assert len(write_at_once(own_store)) == PROCESSES * FILES_EACH
    assert (own_store / "index.sqlite.broken").read_bytes() == b"no database" * 1000


def test_everything_of_an_entry_comes_back(own_store: Path) -> None:
    strange = Path("/models/na\udcffme with\nlines.gguf")  # a name that is not UTF-8
    entry = Entry(strange, SourceKind.GGUF_BASE, "Tiny", "q8_0", "f" * 64, "b", "p", 12, "s", "c", "added")
    Index(own_store).remember([entry, Entry(Path("/none"))])
    assert Index(own_store).entries() == {strange: entry, Path("/none"): Entry(Path("/none"))}
    Index(own_store).forget([strange])
    assert list(Index(own_store).entries()) == [Path("/none")]


def test_an_origin_stays_until_another_is_told(own_store: Path) -> None:
    for origin, kept in (("added", "added"), ("", "added"), ("convert", "convert")):
        Index(own_store).remember([Entry(Path("/x.gguf"), origin=origin)])
        assert Index(own_store).entries()[Path("/x.gguf")].origin == kept


def test_an_older_index_is_taken_over(own_store: Path, base: Path) -> None:
    with closing(sqlite3.connect(own_store / "index.sqlite")) as connection, connection:
        connection.execute(V1)
        connection.execute("INSERT INTO bases VALUES (?, 1, 1, 'f', 1), ('/old.gguf', 1, 1, 'f', 0)", (str(base),))
    assert Store().registered_bases() == [base]
    assert {str(entry.path): entry.origin for entry in Store().remembered()} == {
        str(base): "convert",
        "/old.gguf": "",
    }
    assert Store().fingerprint(base) != "f"  # the old state says nothing of content: looked at again
    with closing(sqlite3.connect(own_store / "index.sqlite")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (VERSION,)


def test_an_index_of_a_newer_edgelora_is_left_alone(own_store: Path, base: Path) -> None:
    Store().register(base)
    with closing(sqlite3.connect(own_store / "index.sqlite")) as connection, connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    before = (own_store / "index.sqlite").read_bytes()
    assert Store().registered_bases() == []
    assert Store().fingerprint(base)  # slower, but right
    for refused in (lambda: Store().register(base), Store().known):
        with pytest.raises(ModelFileError, match="newer edgelora"):
            refused()
    assert (own_store / "index.sqlite").read_bytes() == before


BROKEN = {"no database": lambda data: b"not a database, but long enough to be read as one" * 99,
          "torn pages": lambda data: data[:100] + b"\xff" * (len(data) - 100)}  # fmt: skip


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_index_is_begun_again_and_says_so(own_store: Path, base: Path, damage: str, tmp_path: Path) -> None:
    copy = Path(shutil.copy(base, tmp_path / "copy.gguf"))
    store = Store()
    store.register(base)
    index = own_store / "index.sqlite"
    index.write_bytes(BROKEN[damage](index.read_bytes()))
    store = Store()
    assert store.registered_bases() == []
    assert store.fingerprint(base)
    assert [entry.name for entry in add(store, [copy])] == ["Fennick 2.6m"]
    assert any("begun again" in notice and "edgelora add" in notice for notice in store.notices)
    assert (own_store / "index.sqlite.broken").exists()
    assert Store().registered_bases() == [copy]
    assert Store().notices == []


def test_a_store_that_cannot_be_made_is_an_error_with_a_way_out(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelFileError, match="cannot be used") as caught:
        Store(tmp_path / "file").register(base)
    assert "EDGELORA_HOME" in caught.value.hint
