"""Adapters in memory: a budget that holds, files that come and go beneath it, and nothing left over at the end."""

from __future__ import annotations

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from converters.reader import read_header
from edgelora.adapter_ref import AdapterRef
from edgelora.engine import adapters as adapters_module
from edgelora.engine import mixing
from edgelora.engine.engine import Engine
from edgelora.engine.low_rank import Weights
from edgelora.engine.native import Handle
from edgelora.engine.runtime import Settings
from edgelora.engine.stream import Request
from edgelora.errors import ModelFileError, SettingsError
from tests.edgelora.conftest import write_adapter
from tests.edgelora.engine.runtimes import runtime
from tests.edgelora.engine.traces import Trace, Traced

needs_kernels = pytest.mark.skipif(bool(mixing.why_not()), reason=mixing.why_not() or "-")
MODES = [
    pytest.param("mixed", marks=needs_kernels),
    "switching",
]
QUESTION = "Tell me about Fennick."
GREEDY = {"temperature": 0, "max_tokens": 8}
ENDLESS = {"temperature": 5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 3}
WAIT = 10.0


@pytest.fixture
def ten(base: Path, tmp_path: Path) -> dict[str, Path]:
    """Of one size, each with a text of its own; files of the test's own, which it may delete."""
    return {f"a{i}": write_adapter(tmp_path / f"a{i}.gguf", base, 20 + i, strength=0.25) for i in range(10)}


def size_of(path: Path) -> int:
    """The bytes of its weights."""
    return sum(tensor.size_bytes for tensor in read_header(path).tensors.values())


@contextmanager
def traced(base: Path, adapters: dict[str, Path], **settings: Any) -> Iterator[Traced]:
    with runtime(Settings(base, threads=1, **settings), adapters) as made:
        yield Traced(made)


def asked(steps: Traced, name: str | dict[str, float] | None) -> Trace:
    trace = steps.submit(Request(QUESTION, name, sampling=GREEDY))
    steps.finish()
    return trace


@pytest.fixture
def lone(base: Path, ten: dict[str, Path]) -> dict[str, str]:
    """What each says where all are in memory."""
    with traced(base, ten, parallel=1) as steps:
        said = {name: asked(steps, name).text for name in ten}
    assert len(set(said.values())) > 5, "adapters that say the same show nothing"
    return said


# The budget


@pytest.mark.parametrize("mode", MODES)
def test_the_least_recently_used_is_evicted(mode: str, base: Path, ten: dict[str, Path], lone: dict[str, str]) -> None:
    budget = 2 * size_of(ten["a0"])
    with traced(base, ten, adapter_bytes=budget, mode=mode, parallel=2) as steps:
        memory = steps.made.adapters
        assert memory.loaded() == ["a8", "a9"]
        for name, expected in (("a0", "a0 a9"), ("a9", "a0 a9"), ("a1", "a1 a9"), ("a5", "a1 a5"), ("a1", "a1 a5")):
            assert asked(steps, name).text == lone[name]
            assert memory.loaded() == expected.split()
            assert memory.loaded_bytes == budget


@pytest.mark.parametrize("mode", MODES)
def test_without_any_budget_all_is_read_for_each_request(
    mode: str, base: Path, ten: dict[str, Path], lone: dict[str, str]
) -> None:
    with traced(base, ten, adapter_bytes=0, mode=mode, parallel=2) as steps:
        for name in ("a0", "a1", "a0"):
            assert (steps.made.adapters.loaded(), steps.made.adapters.loaded_bytes) == ([], 0)
            assert asked(steps, name).text == lone[name]
        traces = {name: steps.submit(Request(QUESTION, name, sampling=GREEDY)) for name in ten}
        steps.finish()
        assert {name: trace.text for name, trace in traces.items()} == lone
        assert steps.made.adapters.loaded_bytes == 0


def test_what_is_pinned_or_in_use_stays(base: Path, ten: dict[str, Path], lone: dict[str, str]) -> None:
    with traced(base, ten, adapter_bytes=size_of(ten["a0"]), parallel=3) as steps:
        memory = steps.made.adapters
        asked(steps, "a3")
        memory.pin("a3")
        running = steps.submit(Request(QUESTION, "a4", sampling=ENDLESS))
        steps.until(lambda: len(running.logits) > 2)
        assert memory.loaded() == ["a3", "a4"]
        for name in ("a0", "a1"):
            assert asked_beside(steps, name).text == lone[name]
            assert set(memory.loaded()) >= {"a3", "a4"}
        running.task.interrupt.set()
        steps.finish()
        assert memory.loaded() == ["a3"]
        memory.pin("a3", False)
        asked(steps, "a0")
        assert memory.loaded() == ["a0"]
        with pytest.raises(SettingsError, match="unknown adapter 'a99'"):
            memory.pin("a99")


def asked_beside(steps: Traced, name: str) -> Trace:
    trace = steps.submit(Request(QUESTION, name, sampling=GREEDY))
    steps.until(lambda: trace.is_done)
    return trace


def test_a_pin_is_of_the_name(base: Path, ten: dict[str, Path]) -> None:
    with traced(base, ten, adapter_bytes=size_of(ten["a0"])) as steps:
        memory = steps.made.adapters
        steps.made.load_adapter(AdapterRef("twin", ten["a0"]))
        for name in ("a0", "twin"):
            memory.pin(name)
        memory.pin("twin", False)
        asked(steps, "a0")
        asked(steps, "a5")
        assert "a0" in memory.loaded(), "another name of its content was unpinned"
        steps.made.load_adapter(AdapterRef("a0", ten["a7"]))
        asked(steps, "a5")
        assert "a0" in memory.loaded(), "what replaced it is not pinned"


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """How many adapters' weights are in memory, whoever holds them."""
    made: weakref.WeakSet[Weights] = weakref.WeakSet()
    init = Weights.__init__

    def noted(self: Weights, *arguments: Any) -> None:
        init(self, *arguments)
        made.add(self)

    def count(*, collect: bool = True) -> int:
        if collect:
            gc.collect()
        return len(made)

    monkeypatch.setattr(Weights, "__init__", noted)
    return count


@needs_kernels
def test_those_who_wait_do_not_fill_the_memory(
    base: Path, ten: dict[str, Path], lone: dict[str, str], alive: Callable[..., int]
) -> None:
    most = 0
    with traced(base, ten, adapter_bytes=2 * size_of(ten["a0"]), parallel=1) as steps:
        assert alive() <= 2
        traces = {name: steps.submit(Request(QUESTION, name, sampling=GREEDY)) for name in ten}
        while not steps.made.scheduler.is_idle:
            steps.step()
            time.sleep(0.001)
            most = max(most, alive(collect=False))
        assert {name: trace.text for name, trace in traces.items()} == lone
    assert most <= 4, "the budget is of two; one more may be read while another is in use"


@needs_kernels
def test_nothing_stays_of_a_request_that_left_while_its_adapter_was_read(
    base: Path, ten: dict[str, Path], alive: Callable[..., int]
) -> None:
    with traced(base, ten, adapter_bytes=2 * size_of(ten["a0"]), parallel=1) as steps:
        for name in ten:
            trace = steps.submit(Request(QUESTION, name, sampling=GREEDY))
            steps.made.scheduler.step()
            trace.task.interrupt.set()
            time.sleep(0.01)
            steps.step()
            assert trace.is_done
        asked(steps, "a0")
        assert alive() <= 2
        assert len(steps.made.adapters.loaded()) <= 2


# Reading again


@pytest.fixture
def slow_reading(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[str]]:
    """Files are read only once the event is set; the names of the threads that read."""
    may, threads, read = threading.Event(), list[str](), adapters_module._read

    def waiting(path: Path) -> bytes:
        threads.append(threading.current_thread().name)
        assert may.wait(WAIT)
        return read(path)

    monkeypatch.setattr(adapters_module, "_read", waiting)
    return may, threads


@needs_kernels
def test_others_go_on_while_an_adapter_is_read(
    base: Path, ten: dict[str, Path], lone: dict[str, str], slow_reading: tuple[threading.Event, list[str]]
) -> None:
    may, threads = slow_reading
    may.set()
    with traced(base, ten, adapter_bytes=size_of(ten["a0"]), parallel=2) as steps:
        running = steps.submit(Request(QUESTION, "a9", sampling={**ENDLESS, "max_tokens": 300}))
        steps.until(lambda: len(running.logits) > 2)
        may.clear()
        del threads[:]
        waiting = steps.submit(Request(QUESTION, "a0", sampling=GREEDY))
        bare = steps.submit(Request(QUESTION, sampling=GREEDY))
        written = len(running.logits)
        steps.until(lambda: bare.is_done)
        assert len(running.logits) >= written + 8
        assert not waiting.is_done
        may.set()
        steps.until(lambda: waiting.is_done)
        assert waiting.text == lone["a0"]
        assert threads
        assert threading.current_thread().name not in threads


def test_an_idle_engine_wakes_when_an_adapter_was_read(base: Path, ten: dict[str, Path], lone: dict[str, str]) -> None:
    with Engine(base, ten, threads=1, adapter_bytes=0, parallel=2) as engine:
        for name in ("a0", "a7", "a0"):
            assert engine.chat(QUESTION, adapter=name, sampling=GREEDY).text == lone[name]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["unloaded", "replaced", "checked"])
def test_it_is_read_from_a_file_that_still_has_a_name(
    mode: str, how: str, base: Path, ten: dict[str, Path], lone: dict[str, str], tmp_path: Path
) -> None:
    copy = Path(shutil.copy(ten["a0"], tmp_path / "copy.gguf"))
    with Engine(base, {"a0": ten["a0"]}, threads=1, mode=mode, adapter_bytes=0, parallel=2) as engine:
        if how == "checked":
            engine.check_adapter(copy)
        else:
            engine.load_adapter("copy", copy)
        if how == "unloaded":
            engine.unload_adapter("copy")
        elif how == "replaced":
            engine.load_adapter("copy", ten["a1"])
        copy.unlink()
        assert engine.chat(QUESTION, adapter="a0", sampling=GREEDY).text == lone["a0"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damage", ["deleted", "replaced", "cut"])
def test_a_file_that_changed_is_that_requests_error(
    mode: str, damage: str, base: Path, ten: dict[str, Path], lone: dict[str, str], tmp_path: Path
) -> None:
    kept = tmp_path / "kept.gguf"
    shutil.copy(ten["a0"], kept)
    with traced(base, ten, adapter_bytes=0, mode=mode, parallel=3) as steps:
        running = steps.submit(Request(QUESTION, "a2", sampling=GREEDY))
        steps.until(lambda: len(running.logits) > 1)
        if damage == "deleted":
            ten["a0"].unlink()
        elif damage == "replaced":
            shutil.copy(ten["a1"], ten["a0"])
        else:
            ten["a0"].write_bytes(kept.read_bytes()[:-1000])
        broken = [steps.submit(Request(QUESTION, "a0", sampling=GREEDY)) for _ in range(2)]
        blend = steps.submit(Request(QUESTION, {"a1": 0.5, "a0": 0.5}, sampling=GREEDY))
        other = steps.submit(Request(QUESTION, "a1", sampling=GREEDY))
        steps.finish()
        for trace in (*broken, blend):
            assert isinstance(trace.error, ModelFileError)
            assert str(ten["a0"]) in trace.error.message
        if damage == "replaced":
            assert "holds something else than when it was loaded" in broken[0].error.message  # type: ignore[union-attr]
        assert (running.text, other.text) == (lone["a2"], lone["a1"])
        assert steps.made.adapters.loaded_bytes == 0
        shutil.copy(kept, ten["a0"])  # put back
        assert asked(steps, "a0").text == lone["a0"]


@pytest.mark.parametrize("mode", MODES)
def test_loading_it_again_from_elsewhere_is_enough(
    mode: str, base: Path, ten: dict[str, Path], lone: dict[str, str], tmp_path: Path
) -> None:
    """As the error's hint says: one content, moved to another path, or named there a second time."""
    moved = tmp_path / "moved.gguf"
    shutil.copy(ten["a0"], moved)
    with traced(base, ten, adapter_bytes=0, mode=mode) as steps:
        steps.made.load_adapter(AdapterRef("second", moved))
        ten["a0"].unlink()
        assert asked(steps, "second").text == lone["a0"]
        steps.made.load_adapter(AdapterRef("a0", moved))
        assert asked(steps, "a0").text == lone["a0"]


# Replacing and removing


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", ["none", "all"])
def test_a_stream_ends_on_the_version_that_it_began_with(
    mode: str, budget: str, base: Path, ten: dict[str, Path], lone: dict[str, str]
) -> None:
    bytes_ = 0 if budget == "none" else None
    with traced(base, {"x": ten["a0"]}, mode=mode, parallel=1, adapter_bytes=bytes_) as steps:
        size = size_of(ten["a0"])
        running = steps.submit(Request(QUESTION, "x", sampling=GREEDY))
        steps.until(lambda: len(running.logits) > 1)
        waiting = steps.submit(Request(QUESTION, "x", sampling=GREEDY))
        steps.made.load_adapter(AdapterRef("x", ten["a1"]))
        after = steps.submit(Request(QUESTION, "x", sampling=GREEDY))
        steps.until(lambda: len(waiting.logits) > 1)
        assert steps.made.adapters.loaded_bytes == (size if budget == "none" else 2 * size)
        steps.finish()
        assert [trace.text for trace in (running, waiting, after)] == [lone["a0"], lone["a0"], lone["a1"]]
        assert steps.made.adapters.loaded_bytes == (0 if budget == "none" else size)


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_survives_the_unloading_of_its_adapter(
    mode: str, base: Path, ten: dict[str, Path], lone: dict[str, str]
) -> None:
    with traced(base, {"x": ten["a0"], "y": ten["a1"]}, mode=mode, parallel=1) as steps:
        running = steps.submit(Request(QUESTION, "x", sampling=GREEDY))
        steps.until(lambda: len(running.logits) > 1)
        waiting = steps.submit(Request(QUESTION, {"x": 1.0}, sampling=GREEDY))
        steps.made.unload_adapter("x")
        refused = steps.submit(Request(QUESTION, "x", sampling=GREEDY)).read()
        assert isinstance(refused.error, SettingsError)
        steps.finish()
        assert (running.text, waiting.text) == (lone["a0"], lone["a0"])
        assert steps.made.adapters.loaded_bytes == size_of(ten["a1"])
        steps.made.unload_adapter("y")
        assert steps.made.adapters.loaded_bytes == 0


@pytest.mark.parametrize("mode", MODES)
def test_two_names_of_one_content_take_its_memory_once(
    mode: str, base: Path, ten: dict[str, Path], lone: dict[str, str]
) -> None:
    size = size_of(ten["a0"])
    with traced(base, {"x": ten["a0"], "y": ten["a0"]}, mode=mode) as steps:
        memory = steps.made.adapters
        assert (memory.loaded(), memory.loaded_bytes) == (["x", "y"], size)
        assert memory.get("x").content_hash == memory.get("y").content_hash
        steps.made.load_adapter(AdapterRef("y", ten["a0"]))
        steps.made.unload_adapter("x")
        assert memory.loaded_bytes == size
        assert asked(steps, "y").text == lone["a0"]
        steps.made.unload_adapter("y")
        assert memory.loaded_bytes == 0


def test_a_replacement_that_is_broken_changes_nothing(base: Path, ten: dict[str, Path], lone: dict[str, str]) -> None:
    broken = ten["a1"]
    broken.write_bytes(broken.read_bytes()[:-100])
    with Engine(base, {"x": ten["a0"]}, threads=1) as engine:
        before = engine.adapter("x")
        with pytest.raises(ModelFileError):
            engine.load_adapter("x", broken)
        assert engine.adapter("x") == before
        assert engine.chat(QUESTION, adapter="x", sampling=GREEDY).text == lone["a0"]


def test_the_engine_describes_the_adapter_that_requests_use(base: Path, ten: dict[str, Path]) -> None:
    """Also where two threads load one name at once."""
    with Engine(base, threads=1) as engine:
        for _ in range(15):
            threads = [threading.Thread(target=engine.load_adapter, args=("x", ten[name])) for name in ("a0", "a1")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT)
            used = engine._call(lambda runtime: runtime.adapters.get("x").content_hash)
            assert engine.adapter("x").content_hash == used


def test_adapters_come_and_go_on_other_threads_while_streams_run(
    base: Path, ten: dict[str, Path], lone: dict[str, str]
) -> None:
    stop, problems = threading.Event(), list[BaseException]()
    with Engine(base, {"a0": ten["a0"]}, threads=1, parallel=4, adapter_bytes=3 * size_of(ten["a0"])) as engine:

        def coming_and_going(names: list[str]) -> None:
            try:
                while not stop.is_set():
                    for name in names:
                        engine.load_adapter(name, ten[name])
                        assert engine.chat(QUESTION, adapter=name, sampling=GREEDY).text == lone[name]
                        engine.unload_adapter(name)
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=coming_and_going, args=([f"a{i}", f"a{i + 1}"],)) for i in (1, 3, 5)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            assert engine.chat(QUESTION, adapter="a0", sampling=GREEDY).text == lone["a0"]
        stop.set()
        for thread in threads:
            thread.join(WAIT)
        assert not problems
        assert engine.adapters == ["a0"]
        assert engine.chat(QUESTION, adapter="a0", sampling=GREEDY).text == lone["a0"]
        assert engine._call(lambda runtime: runtime.adapters.loaded_bytes) == size_of(ten["a0"])


# The end


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """The native objects that are not freed."""
    open_now: list[Handle] = []
    init, close = Handle.__init__, Handle.close

    def opened(self: Handle, *arguments: Any) -> None:
        init(self, *arguments)
        open_now.append(self)

    def closed(self: Handle) -> None:
        close(self)
        open_now[:] = [each for each in open_now if each is not self]

    monkeypatch.setattr(Handle, "__init__", opened)
    monkeypatch.setattr(Handle, "close", closed)
    return open_now


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_at_the_end(
    mode: str,
    base: Path,
    ten: dict[str, Path],
    tmp_path: Path,
    handles: list[Handle],
    alive: Callable[..., int],
) -> None:
    odd = write_odd(tmp_path / "odd.gguf", base)
    threads = threading.active_count()
    with traced(base, {**ten, "odd": odd}, mode=mode, adapter_bytes=2 * size_of(ten["a0"]), parallel=3) as steps:
        for name in ("a0", "odd", "a1", None, "a2", "odd"):
            asked(steps, name)
        several = [steps.submit(Request(QUESTION, n, sampling=ENDLESS)) for n in ("a3", "odd", "a4", "a5")]
        steps.until(lambda: any(len(trace.logits) > 3 for trace in several))
        several[0].task.interrupt.set()
        steps.step(3)
        steps.made.load_adapter(AdapterRef("a4", ten["a6"]))
        steps.made.unload_adapter("odd")
        steps.step(20)
        before = len(handles)
        for trace in several:
            trace.task.interrupt.set()
        steps.finish()
        assert len(handles) < before
        for _ in range(3):  # again and again takes nothing more
            steady = len(handles), alive()
            for name in ("a7", "a8", "a9"):
                asked(steps, name)
        assert (len(handles), alive()) == steady
        steps.submit(Request(QUESTION, "a0", sampling=ENDLESS))
        steps.step(30)
        several.clear()
    assert handles == []
    assert threading.active_count() == threads
    del steps
    assert alive() == 0


def write_odd(path: Path, base: Path) -> Path:
    """One that only llama.cpp itself can apply: one of its A and B are of two types."""
    import numpy as np

    half = np.random.default_rng(4).standard_normal((256, 4)).astype(np.float16) * np.float16(0.15)
    return write_adapter(path, base, 4, tensors={"blk.0.attn_q.weight.lora_b": half})


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_with_adapters_closes_without_a_word(mode: str, base: Path, ten: dict[str, Path]) -> None:
    with Engine(base, ten, threads=1, mode=mode, parallel=1) as engine:
        running = engine.stream(QUESTION, adapter="a0", sampling=ENDLESS)
        next(running)
        waiting = engine.stream(QUESTION, adapter="a1", sampling=ENDLESS)
    assert running.completion.finish_reason == "cancelled"
    with pytest.raises(Exception, match="closed before this request was answered"):
        _ = waiting.completion
