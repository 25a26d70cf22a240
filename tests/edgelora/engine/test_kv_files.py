"""KV in a folder: the next engine begins where the last one ended, and with nobody else's."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelora.engine.cache import MIN_COPY, Kept
from edgelora.engine.engine import Engine
from edgelora.engine.kv_files import KVFiles
from edgelora.errors import SettingsError

QUESTION = "Tell me of the miller, the fisherman and the boats in the storm, and who it was that baked the bread."
SAMPLING = {"temperature": 0, "max_tokens": 8}


def opened(base: Path, adapters: dict[str, Path], folder: Path | None, **options: Any) -> Engine:
    return Engine(base, adapters, threads=1, cache_dir=folder, **options)


def asked(base: Path, adapters: dict[str, Path], folder: Path | None, adapter: str = "red", **options: Any) -> Any:
    with opened(base, adapters, folder, **options) as engine:
        return engine.chat(QUESTION, adapter=adapter, sampling=SAMPLING)


def test_a_prompt_is_read_once_for_all_engines(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    first = asked(base, adapters, tmp_path)
    again = asked(base, adapters, tmp_path)
    assert (first.cached_tokens, again.cached_tokens) == (0, first.prompt_tokens - 1)
    assert again.text == first.text
    assert asked(base, adapters, None).cached_tokens == 0


def test_another_adapter_scale_base_or_type_gets_none_of_it(
    base: Path, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    asked(base, adapters, tmp_path)
    assert asked(base, adapters, tmp_path, "blue").cached_tokens == 0
    assert asked(base, adapters, tmp_path, kv_type="q8_0").cached_tokens == 0
    assert asked(bases["q8_0"], adapters, tmp_path).cached_tokens == 0
    with opened(base, adapters, tmp_path) as engine:
        assert engine.chat(QUESTION, adapter="red", scale=0.5, sampling=SAMPLING).cached_tokens == 0
    changed = bytearray(base.read_bytes())
    changed[len(changed) // 2] ^= 1
    other = tmp_path / "other.gguf"
    other.write_bytes(changed)
    with Engine(other, adapters, threads=1, cache_dir=tmp_path, force=True) as engine:
        done = engine.chat(QUESTION, adapter="red", sampling=SAMPLING)
    assert done.cached_tokens == 0


def test_deterministic_requests_start_from_exact_kv_only(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    asked(base, adapters, tmp_path)
    with opened(base, adapters, tmp_path) as engine:
        assert engine.chat(QUESTION, adapter="red", sampling=SAMPLING, deterministic=True).cached_tokens == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "nonsense"])
def test_a_damaged_file_costs_no_more_than_itself(
    base: Path, adapters: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    first = asked(base, adapters, tmp_path)
    (path,) = tmp_path.glob("*.kv")
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    path.write_bytes({"cut": data[:-9], "flipped": data, "empty": b"", "nonsense": b"[1, 2]\n"}[damage])
    again = asked(base, adapters, tmp_path)
    assert (again.cached_tokens, again.text) == (0, first.text)


def kept(number: int, size: int = 100) -> Kept:
    state = np.full(size, number, np.uint8)
    return Kept((("hash", 1.0),), 0, tuple(range(number, number + MIN_COPY)), 0, lambda: state, size)


def test_the_least_recently_used_files_go(tmp_path: Path) -> None:
    files = KVFiles(tmp_path, "owner", 1500)
    for number in range(5):
        files.save([kept(number)])
        for at, path in enumerate(sorted(tmp_path.glob("*.kv"), key=lambda each: each.stat().st_mtime_ns)):
            os.utime(path, ns=(at * 10**9, at * 10**9))
    left = [each.tokens[0] for each in files.entries()]
    assert left == sorted(left) and left[-1] == 4 and 1 < len(left) < 5  # noqa: PT018
    assert sum(path.stat().st_size for path in tmp_path.glob("*.kv")) <= 1500


def test_files_are_their_owners_alone_and_others_are_left(tmp_path: Path) -> None:
    mine, theirs = KVFiles(tmp_path, "mine", 10**6), KVFiles(tmp_path, "theirs", 10**6)
    mine.save([kept(1)])
    theirs.save([kept(1), kept(2)])
    assert (len(mine.entries()), len(theirs.entries())) == (1, 2)
    KVFiles(tmp_path, "mine", 0).save([])
    assert (len(mine.entries()), len(theirs.entries())) == (0, 2)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.kv")} == {0o600}


def test_a_folder_that_cannot_be_made_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cache_dir"):
        Engine(base, cache_dir=tmp_path / "file" / "cache")
