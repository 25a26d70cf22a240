"""The engine's process: what it answers, how it dies, and how it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edgelora.engine.engine import Engine
from edgelora.engine.stream import Request
from edgelora.errors import ModelFileError, SettingsError
from edgelora.serve.process import READY, EngineDiedError, EngineDownError, EngineProcess, Reply
from edgelora.serve.suspects import Suspects

QUESTION = "Where does the miller live?"
GREEDY = {"temperature": 0, "max_tokens": 20}
ENDLESS = {"temperature": 5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 3, "max_tokens": 400}


@asynccontextmanager
async def engine_process(
    base: Path,
    adapters: dict[str, Path],
    on_death: Callable[[str, frozenset[str]], None] = lambda how, suspects: None,
    *,
    silent_seconds: float = 30.0,
    step_seconds: float = 600.0,
    **options: Any,
) -> AsyncIterator[EngineProcess]:
    async def restore() -> None:
        for name, path in adapters.items():
            await made.call("load", name=name, path=str(path), scale=1.0, tried=[])

    given = {"base": str(base), "threads": 1, "n_ctx": 512, **options}
    made = EngineProcess(given, restore, on_death, silent_seconds=silent_seconds, step_seconds=step_seconds)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def text_of(made: EngineProcess, request: Request) -> tuple[str, dict[str, Any]]:
    reply = made.generate(request)
    pieces = [piece.text async for piece in reply]
    return "".join(pieces), reply.account


async def whole(reply: Reply) -> str:
    return "".join([piece.text async for piece in reply])


def run(work: Callable[[], Awaitable[None]], seconds: float = 60) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await work()

    asyncio.run(bounded())


async def until(happened: Callable[[], bool]) -> None:
    while not happened():
        await asyncio.sleep(0.01)


def test_replies_are_the_engines_own(base: Path, adapters: dict[str, Path]) -> None:
    with Engine(base, adapters, threads=1, n_ctx=512) as engine:
        want = {name: engine.chat(QUESTION, adapter=name, sampling=GREEDY) for name in ("red", "none")}
        blend = engine.chat(QUESTION, adapter={"red": 0.5, "blue": 0.5}, sampling=GREEDY).text

    async def work() -> None:
        async with engine_process(base, adapters) as made:
            for name, done in want.items():
                text, account = await text_of(made, Request(QUESTION, name, sampling=GREEDY))
                assert text == done.text
                assert account["completion_tokens"] == done.completion_tokens
                assert account["adapter_hash"] == done.adapter_hash
            assert (await text_of(made, Request(QUESTION, {"red": 0.5, "blue": 0.5}, sampling=GREEDY)))[0] == blend
            biased = Request(QUESTION, sampling={**GREEDY, "logit_bias": {7: -100.0}, "logprobs": 1, "max_tokens": 2})
            pieces = [piece async for piece in made.generate(biased)]
            assert sum(len(piece.logprobs) for piece in pieces) == 2
            assert await made.call("count_tokens", messages="hello", adapter="red") > 0
            state = await made.call("state")
            assert state["adapters"] == ["red", "blue"]
            assert state["pid"] == made.pid != os.getpid()

    run(work)


def test_errors_keep_their_kind(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")

    async def work() -> None:
        async with engine_process(base, adapters) as made:
            with pytest.raises(SettingsError, match="unknown adapter 'nobody'"):
                await text_of(made, Request(QUESTION, "nobody"))
            with pytest.raises(SettingsError, match="temperature is -1"):
                await text_of(made, Request(QUESTION, sampling={"temperature": -1}))
            for path in ("broken.gguf", "missing.gguf"):
                with pytest.raises(ModelFileError):
                    await made.call("load", name="broken", path=str(tmp_path / path), scale=1.0, tried=[])
            assert (await text_of(made, Request(QUESTION, "red", sampling=GREEDY)))[0]

    run(work)


def test_a_base_that_cannot_be_loaded_is_an_error_of_the_start(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"nothing")

    async def work() -> None:
        with pytest.raises(ModelFileError):
            async with engine_process(tmp_path / "base.gguf", {}):
                pass

    run(work)


def test_a_reply_that_nobody_waits_for_ends_within_a_step(base: Path) -> None:
    async def work() -> None:
        async with engine_process(base, {}, parallel=1) as made:
            reply = made.generate(Request(QUESTION, sampling=ENDLESS))
            async for _ in reply:
                break
            reply.cancel()
            began = time.monotonic()
            await text_of(made, Request("hello", sampling={**GREEDY, "max_tokens": 1}))
            assert time.monotonic() - began < 5
            assert (await made.call("state"))["running"] == 0

    run(work)


def test_killed_it_comes_back_with_its_adapters(base: Path, adapters: dict[str, Path]) -> None:
    deaths = list[tuple[str, frozenset[str]]]()

    async def work() -> None:
        async with engine_process(base, adapters, lambda how, who: deaths.append((how, who)), parallel=4) as made:
            text, _ = await text_of(made, Request(QUESTION, "red", sampling=GREEDY))
            replies = [made.generate(Request(QUESTION, "red", sampling=ENDLESS)) for _ in range(10)]
            ended = [asyncio.create_task(whole(reply)) for reply in replies]
            await asyncio.sleep(0.2)
            assert made.pid is not None
            os.kill(made.pid, signal.SIGKILL)
            results = await asyncio.gather(*ended, return_exceptions=True)
            assert all(isinstance(result, EngineDiedError) for result in results), results
            if made.state != READY:
                with pytest.raises(EngineDownError) as caught:
                    made.generate(Request(QUESTION))
                assert caught.value.retry_after >= 1
            await until(lambda: made.state == READY)
            assert made.restarts == 1
            assert (await text_of(made, Request(QUESTION, "red", sampling=GREEDY)))[0] == text

    run(work)
    assert deaths == [("signal SIGKILL", frozenset())]


def test_who_was_computed_when_it_crashed_is_named(base: Path, adapters: dict[str, Path]) -> None:
    deaths = list[frozenset[str]]()

    async def work() -> None:
        async with engine_process(base, adapters, lambda how, who: deaths.append(who), parallel=4) as made:
            wanted = [made.generate(Request(QUESTION, name, sampling=ENDLESS)) for name in ("red", "none")]
            ended = [asyncio.create_task(whole(reply)) for reply in wanted]
            await asyncio.sleep(0.2)
            assert made.pid is not None
            os.kill(made.pid, signal.SIGABRT)
            await asyncio.gather(*ended, return_exceptions=True)
            await until(lambda: made.state == READY)

    run(work)
    assert deaths == [frozenset({"red"})]


def test_a_server_that_is_killed_leaves_no_engine_running(base: Path) -> None:
    async def work() -> None:
        async with engine_process(base, {}) as made:
            process, pid = made._process, made.pid
            assert process is not None
            assert pid is not None
            made._keeper.cancel()  # type: ignore[union-attr]
            made._writer.transport.abort()  # type: ignore[union-attr]  # what the end of this process would do
            await asyncio.wait_for(process.wait(), 20)
            assert process.returncode == 0

    run(work)


def test_who_was_loaded_or_always_there_is_guilty() -> None:
    suspects = Suspects()
    assert not suspects.died(frozenset({"a", "b"}))
    assert not suspects.died(frozenset({"b", "c"})) - {"b"}
    assert Suspects().died(frozenset()) == frozenset()
    alone = Suspects()
    assert [alone.died(frozenset({"a"})) for _ in range(2)] == [frozenset(), frozenset({"a"})]
    forgiven = Suspects()
    forgiven.died(frozenset({"a"}))
    forgiven.cleared("a")
    assert not forgiven.died(frozenset({"a"}))
