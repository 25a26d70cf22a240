"""Which adapters there are, with an engine that is played: loads that fail, deaths, restarts of the server."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from edgelora.adapter_ref import AdapterRef
from edgelora.errors import ModelFileError, SettingsError
from edgelora.serve.problems import ApiError
from edgelora.serve.process import EngineDiedError
from edgelora.serve.registry import ABANDONED_SECONDS, QUARANTINED, READY, STATE_FILE, Registry


class Played:
    """An engine that loads whatever a file says."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.tried: dict[str, list[str]] = {}

    async def call(self, do: str, **given: Any) -> Any:
        if do == "load":
            text = Path(given["path"]).read_text()
            if text == "broken":
                raise ModelFileError(f"{given['path']}: is broken")
            if text == "deadly":
                raise EngineDiedError("the process ended")
            self.loaded[given["name"]], self.tried[given["name"]] = text, given["tried"]
            return {"content_hash": text, "contract": None, "notices": []}
        assert do == "unload"
        if given["name"] not in self.loaded:
            raise SettingsError("unknown")
        del self.loaded[given["name"]]
        return None


def registry(folder: Path, *given: AdapterRef) -> tuple[Registry, Played]:
    made, engine = Registry(given, folder), Played()
    made.engine = engine  # type: ignore[assignment]
    return made, engine


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))  # type: ignore[arg-type]


def test_what_was_done_by_hand_is_done_again_after_a_restart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_text(name)

    async def first() -> None:
        made, engine = registry(tmp_path)
        await made.restore()
        assert engine.loaded == {"a": "a", "b": "b"}
        await made.load("alias", made.inside("a.gguf"), 0.5)
        await made.unload("b")
        assert engine.loaded == {"a": "a", "alias": "a"}

    async def second() -> None:
        made, engine = registry(tmp_path)
        await made.restore()
        assert engine.loaded == {"a": "a", "alias": "a"}
        assert made.get("alias").scale == 0.5
        with pytest.raises(ApiError):
            made.get("b")
        await made.load("b", made.inside("b.gguf"))
        assert made.get("b").state == READY

    run(first)
    run(second)
    assert json.loads((tmp_path / STATE_FILE).read_text())["unloaded"] == []


def test_after_the_engine_died_what_it_computed_with_is_not_tried_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_text(f"content of {name}")

    async def work() -> None:
        made, engine = registry(tmp_path)
        await made.restore()
        assert engine.tried == {"a": [], "b": []}
        await made.load("b", made.inside("b.gguf"), 0.5)
        assert engine.tried["b"] == []  # at this scale it is another
        await made.restore()
        assert engine.tried == {"a": ["content of a"], "b": ["content of b"]}

    run(work)


def test_a_broken_state_file_costs_no_more_than_itself(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("a")
    (tmp_path / STATE_FILE).write_text('{"loaded": 7')

    async def work() -> None:
        made, engine = registry(tmp_path)
        await made.restore()
        assert engine.loaded == {"a": "a"}

    run(work)


def test_an_adapter_that_takes_the_engine_down_twice_stays_out(tmp_path: Path) -> None:
    for name, text in (("good", "good"), ("zz", "deadly")):
        (tmp_path / f"{name}.gguf").write_text(text)

    async def work() -> None:
        made, engine = registry(tmp_path)
        for _ in range(2):
            with pytest.raises(EngineDiedError):
                await made.restore()
            made.died(frozenset({"zz"}))
        await made.restore()
        assert set(engine.loaded) == {"good"}
        assert {entry.name: entry.state for entry in made} == {"good": READY, "zz": QUARANTINED}
        with pytest.raises(ApiError) as caught:
            made.get("zz")
        assert (caught.value.status, caught.value.code) == (503, "quarantined")
        (tmp_path / "zz.gguf").write_text("mended")  # another file is another try
        await made.rescan()
        assert made.get("zz").state == READY
        assert engine.loaded["zz"] == "mended"

    run(work)


def test_a_file_of_the_command_line_that_changes_is_replaced(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "adapters", tmp_path / "vip.gguf"
    folder.mkdir()
    elsewhere.write_text("one")

    async def work() -> None:
        made, engine = registry(folder, AdapterRef("vip", elsewhere, 0.7))
        await made.restore()
        elsewhere.write_text("another")
        await made.rescan()
        assert engine.loaded == {"vip": "another"}
        assert (made.get("vip").generation, made.get("vip").scale) == (2, 0.7)

    run(work)


def test_generations_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("a")

    async def work() -> None:
        made, _ = registry(tmp_path)
        await made.load("x", made.inside("a.gguf"), if_generation=0)
        for call in (made.load("x", made.inside("a.gguf"), if_generation=0), made.unload("x", if_generation=2)):
            with pytest.raises(ApiError) as caught:
                await call
            assert caught.value.status == 409
        await made.unload("x", if_generation=1)

    run(work)


def test_uploads_that_a_killed_server_left_behind_are_removed(tmp_path: Path) -> None:
    old, young = (tmp_path / f".{name}.0123.upload" for name in ("old", "young"))
    for path in (old, young):
        path.write_text("half an adapter")
    os.utime(old, (time.time() - 2 * ABANDONED_SECONDS,) * 2)
    made, _ = registry(tmp_path)
    run(made.restore)
    assert list(tmp_path.iterdir()) == [young]


@pytest.mark.parametrize("path", ["../a.gguf", "/a.gguf", "", ".", "a.txt", "x/../../a.gguf", "\0.gguf", "a" * 5000])
def test_paths_stay_in_the_folder(path: str, tmp_path: Path) -> None:
    with pytest.raises(ApiError):
        Registry((), tmp_path / "adapters").inside(path)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    (tmp_path / "secret.gguf").write_text("x")
    (folder / "link.gguf").symlink_to(tmp_path / "secret.gguf")
    with pytest.raises(ApiError):
        Registry((), folder).inside("link.gguf")


def test_a_file_that_broke_meanwhile_is_refused_after_the_engine_died(tmp_path: Path) -> None:
    """Before, its old content went on; the new process has none."""
    (tmp_path / "a.gguf").write_text("a")

    async def work() -> None:
        made, engine = registry(tmp_path)
        await made.restore()
        (tmp_path / "a.gguf").write_text("broken")
        await made.rescan()
        assert made.get("a").problem
        assert engine.loaded == {"a": "a"}
        engine.loaded.clear()
        await made.restore()
        with pytest.raises(ApiError) as caught:
            made.get("a")
        assert caught.value.status == 404
        (tmp_path / "a.gguf").write_text("mended")
        await made.rescan()
        assert made.get("a").state == READY

    run(work)
