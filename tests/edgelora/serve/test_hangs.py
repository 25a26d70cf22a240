"""An engine's process that hangs, or dies at the worst moment: what it is doing is arranged, how it ends is real."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgelora.engine.stream import Request
from edgelora.errors import SettingsError
from edgelora.serve.process import READY, RESTARTING, EngineDiedError, EngineProcess
from edgelora.serve.protocol import MAX_LINE_BYTES
from edgelora.serve.pulse import BEATS, START_SECONDS, Pulse
from tests.edgelora.serve.conftest import Sabotage
from tests.edgelora.serve.test_faults import asked, error_of, in_process, text_of
from tests.edgelora.serve.test_process import ENDLESS, GREEDY, QUESTION, engine_process, run, until, whole

SILENT_SECONDS = 2.0
"""Of no answer: long for a process that runs, on a machine that is busy with other tests."""

STEP_HANGS = """
from edgelora.engine.scheduler import Scheduler
step = Scheduler.step
def hanging(scheduler):
    while trigger.exists():
        time.sleep(0.01)
    return step(scheduler)
Scheduler.step = hanging
"""
DIES_AMID_A_LINE = """
import socket
class Dying(socket.socket):
    def sendall(self, data):
        if b'"piece"' in data and trigger.exists():
            trigger.unlink()
            super().sendall(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        super().sendall(data)
socket.socket = Dying
"""


STARTS_FAIL = """
from edgelora.engine.engine import Engine
begin = Engine.__init__
def failing(engine, *given, **options):
    if trigger.exists():
        trigger.unlink()
        raise MemoryError
    begin(engine, *given, **options)
Engine.__init__ = failing
"""
SAYS_NONSENSE = """
import socket
class Talking(socket.socket):
    def sendall(self, data):
        if b'"piece"' in data and trigger.exists():
            trigger.unlink()
            super().sendall(b"free(): invalid pointer\\n")
        super().sendall(data)
socket.socket = Talking
"""
ANSWERS_AT_LENGTH = """
from edgelora.engine.engine import Engine
Engine.count_tokens = lambda engine, messages, adapter: "x" * (1 << 26)
"""


# What counts as hanging


def test_no_answer_for_long_is_a_hang() -> None:
    pulse = Pulse(30.0, 600.0)
    pulse.answered(0)
    assert [pulse.beat() for _ in range(BEATS)] == [""] * BEATS
    pulse.answered(0)
    assert [pulse.beat() for _ in range(BEATS)] == [""] * BEATS
    assert pulse.beat() == "it did not answer for 30 s"
    assert not pulse.is_stuck


def test_before_its_first_answer_a_process_has_longer() -> None:
    pulse = Pulse(30.0, 600.0)
    beats = round(START_SECONDS / pulse.interval)
    assert [pulse.beat() for _ in range(beats)] == [""] * beats
    assert pulse.beat()


def beats_until_stuck(turns: Callable[[int], int], most: int) -> int | None:
    """How many beats a process that always answers, with these turns, lives; None for all."""
    pulse = Pulse(30.0, 600.0)
    for number in range(most):
        if pulse.beat():
            assert pulse.is_stuck
            return number
        pulse.answered(turns(number))
    return None


def test_one_step_for_long_is_a_hang_and_many_or_none_are_not() -> None:
    assert beats_until_stuck(lambda number: 7, 1000) == 201  # 600 s, in beats of 3 s
    assert beats_until_stuck(lambda number: 6, 1000) is None
    assert beats_until_stuck(lambda number: 7 + 2 * (number // 200), 1000) is None


# Real processes


def test_a_process_that_is_stopped_is_replaced(base: Path, adapters: dict[str, Path]) -> None:
    deaths = list[tuple[str, frozenset[str]]]()

    async def work() -> None:
        async with engine_process(
            base, adapters, lambda how, who: deaths.append((how, who)), silent_seconds=SILENT_SECONDS
        ) as made:
            text = await whole(made.generate(Request(QUESTION, "red", sampling=GREEDY)))
            replies = [made.generate(Request(QUESTION, "red", sampling=ENDLESS)) for _ in range(10)]
            stop(made)
            results = await asyncio.gather(*map(whole, replies), return_exceptions=True)
            assert all(isinstance(result, EngineDiedError) for result in results), results
            await until(lambda: made.state == READY)
            assert made.restarts == 1
            assert await whole(made.generate(Request(QUESTION, "red", sampling=GREEDY))) == text

    run(work)
    assert deaths == [(f"signal SIGKILL: it did not answer for {SILENT_SECONDS:g} s", frozenset())]


def stop(made: EngineProcess) -> None:
    kill(made, signal.SIGSTOP)


def kill(made: EngineProcess, number: int) -> None:
    assert made.pid is not None
    os.kill(made.pid, number)


def test_clients_are_told_of_a_hang_as_of_a_death(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    async def go() -> None:
        async with in_process(base, tmp_path, silent_seconds=SILENT_SECONDS) as (client, server):
            said = text_of(await client.post("/v1/chat/completions", json=asked("base")))
            endless = asked("base", stream=True, **{**ENDLESS, "grammar": "root ::= [a-z ] root"})
            streams = [client.post("/v1/chat/completions", json=endless) for _ in range(3)]
            under_way = asyncio.gather(*streams)
            await until(lambda: server.under_way == 3)
            stop(server.engine)
            for answer in await under_way:
                assert "engine_died" in answer.text.strip().splitlines()[-1]
            for path in ("/ready", "/v1/chat/completions"):
                answer = await client.request("GET" if path == "/ready" else "POST", path, json=asked("base"))
                assert answer.status_code == 503
                assert error_of(answer)["code"] == "engine_starting"
                assert int(answer.headers["Retry-After"]) >= 1
            await until(lambda: server.is_ready)
            assert text_of(await client.post("/v1/chat/completions", json=asked("base"))) == said

    run(go)


def test_while_the_server_does_not_run_nothing_is_a_hang(base: Path) -> None:
    """As where the machine sleeps: neither process runs, for longer than an answer may take."""

    async def work() -> None:
        async with engine_process(base, {}, silent_seconds=SILENT_SECONDS) as made:
            stop(made)
            time.sleep(1.5 * SILENT_SECONDS)  # the server's loop, which nothing can be awaited on meanwhile
            kill(made, signal.SIGCONT)
            assert await whole(made.generate(Request(QUESTION, sampling=GREEDY)))
            assert made.restarts == 0

    run(work)


def test_a_step_that_takes_longer_than_an_answer_may_is_no_hang(base: Path, sabotage: Sabotage) -> None:
    trigger = sabotage(STEP_HANGS)

    async def work() -> None:
        async with engine_process(base, {}, silent_seconds=SILENT_SECONDS) as made:
            trigger.touch()
            reply = asyncio.create_task(whole(made.generate(Request(QUESTION, sampling=GREEDY))))
            await asyncio.sleep(1.5 * SILENT_SECONDS)
            trigger.unlink()
            assert await reply
            assert made.restarts == 0

    run(work)


def test_a_step_without_an_end_is_a_hang_and_who_was_in_it_a_suspect(
    base: Path, adapters: dict[str, Path], sabotage: Sabotage
) -> None:
    trigger, deaths = sabotage(STEP_HANGS), list[tuple[str, frozenset[str]]]()

    async def work() -> None:
        def on_death(how: str, suspects: frozenset[str]) -> None:
            deaths.append((how, suspects))
            trigger.unlink()

        async with engine_process(base, adapters, on_death, silent_seconds=5.0, step_seconds=1.0) as made:
            trigger.touch()
            with pytest.raises(EngineDiedError):
                await whole(made.generate(Request(QUESTION, "red", sampling=GREEDY)))
            await until(lambda: made.state == READY)
            assert await whole(made.generate(Request(QUESTION, "red", sampling=GREEDY)))

    run(work)
    assert deaths == [("signal SIGKILL: its engine was in one step for 1 s", frozenset({"red"}))]


def test_killed_amid_a_line_it_comes_back(base: Path, sabotage: Sabotage) -> None:
    trigger = sabotage(DIES_AMID_A_LINE)

    async def work() -> None:
        async with engine_process(base, {}) as made:
            text = await whole(made.generate(Request(QUESTION, sampling=GREEDY)))
            trigger.touch()
            with pytest.raises(EngineDiedError):
                await whole(made.generate(Request(QUESTION, sampling=GREEDY)))
            assert not trigger.exists()
            await until(lambda: made.state == READY)
            assert made.restarts == 1
            assert await whole(made.generate(Request(QUESTION, sampling=GREEDY))) == text

    run(work)


def test_killed_while_it_loads_its_adapters_it_comes_back(base: Path, adapters: dict[str, Path]) -> None:
    async def work() -> None:
        async def restore() -> None:
            loading = [
                made.call("load", name=name, path=str(path), scale=1.0, tried=[]) for name, path in adapters.items()
            ]
            if made.restarts in (0, 2):
                kill(made, signal.SIGKILL)
            await asyncio.gather(*loading)

        made = EngineProcess({"base": str(base), "threads": 1, "n_ctx": 512}, restore)
        await made.start()
        try:
            assert made.restarts == 1
            kill(made, signal.SIGKILL)
            await until(lambda: made.restarts == 3 and made.state == READY)
            assert await whole(made.generate(Request(QUESTION, "red", sampling=GREEDY)))
        finally:
            await made.stop()

    run(work)


def test_killed_between_two_of_its_adapters_it_starts_again(base: Path, adapters: dict[str, Path]) -> None:
    async def work() -> None:
        async def restore() -> None:
            for name, path in adapters.items():
                if name == "blue" and made.restarts == 0:
                    kill(made, signal.SIGKILL)
                    await until(lambda: made.state == RESTARTING)
                await made.call("load", name=name, path=str(path), scale=1.0, tried=[])

        made = EngineProcess({"base": str(base), "threads": 1, "n_ctx": 512}, restore)
        await made.start()
        try:
            assert made.restarts == 1
            assert await whole(made.generate(Request(QUESTION, "blue", sampling=GREEDY)))
        finally:
            await made.stop()

    run(work)


def test_a_start_that_fails_for_no_reason_it_knows_is_followed_by_another(base: Path, sabotage: Sabotage) -> None:
    trigger = sabotage(STARTS_FAIL)

    async def work() -> None:
        async with engine_process(base, {}) as made:
            trigger.touch()
            kill(made, signal.SIGKILL)
            await until(lambda: made.restarts == 2 and made.state == READY)
            assert not trigger.exists()
            assert await whole(made.generate(Request(QUESTION, sampling=GREEDY)))

    run(work)


def test_a_process_that_says_what_nobody_understands_is_replaced(base: Path, sabotage: Sabotage) -> None:
    trigger = sabotage(SAYS_NONSENSE)

    async def work() -> None:
        async with engine_process(base, {}) as made:
            trigger.touch()
            with pytest.raises(EngineDiedError):
                await whole(made.generate(Request(QUESTION, sampling=GREEDY)))
            await until(lambda: made.restarts == 1 and made.state == READY)
            assert await whole(made.generate(Request(QUESTION, sampling=GREEDY)))

    run(work)


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="this system has no such signals")
def test_a_signal_without_a_name_is_told_by_its_number(base: Path) -> None:
    deaths = list[str]()
    number = signal.SIGRTMIN + 1

    async def work() -> None:
        async with engine_process(base, {}, lambda how, who: deaths.append(how)) as made:
            kill(made, number)
            await until(lambda: made.restarts == 1 and made.state == READY)

    run(work)
    assert deaths == [f"signal {number}"]


def test_what_is_too_long_for_a_line_costs_no_more_than_itself(base: Path, sabotage: Sabotage) -> None:
    sabotage(ANSWERS_AT_LENGTH)

    async def work() -> None:
        async with engine_process(base, {}) as made:
            reply = asyncio.create_task(whole(made.generate(Request(QUESTION, sampling=ENDLESS))))
            with pytest.raises(SettingsError, match="bytes at once are too many"):
                made.generate(Request("x" * MAX_LINE_BYTES))
            with pytest.raises(SettingsError, match="bytes at once are too many"):
                await made.call("count_tokens", messages="hello", adapter=None)
            assert await reply
            assert made.restarts == 0

    run(work)
