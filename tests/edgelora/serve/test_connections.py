"""Clients that do not read, and a thousand that say nothing: the others are served as if they were not there."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from edgelora.serve.connections import FILES, Connection
from edgelora.serve.running import HttpServer
from tests.edgelora.serve.conftest import Served, serving
from tests.edgelora.serve.test_faults import ENDLESS, NAMES, asked, in_process, text_of
from tests.edgelora.serve.test_process import until

IDLE = 1000
SMALL = 4096
"""Bytes of a socket's buffers, far fewer than a reply with log probabilities has."""
MOST_UNSENT = 1 << 16


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes little of what a server sends."""
    monkeypatch.setattr(Connection, "send_bytes", SMALL)


@asynccontextmanager
async def narrow(base: Path, folder: Path, unread_seconds: float) -> AsyncIterator[tuple[HttpServer, str, Any]]:
    """A server on a socket, its address, and what is behind it."""
    async with in_process(base, folder, unread_seconds=unread_seconds) as (_, server):
        listening = socket.create_server(("127.0.0.1", 0))
        http = HttpServer(server)
        serving = asyncio.create_task(http.serve(sockets=[listening]))
        try:
            yield http, f"http://127.0.0.1:{listening.getsockname()[1]}", server
        finally:
            http.should_exit = http.force_exit = True
            await serving
            listening.close()


@asynccontextmanager
async def long_reply(url: str, *, stream: bool) -> AsyncIterator[socket.socket]:
    """The connection of a client that asked for more than its socket holds, and has read nothing."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    body = json.dumps(asked("red", stream=stream, logprobs=True, top_logprobs=20, **ENDLESS)).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
        request = f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body
        await asyncio.get_running_loop().sock_sendall(client, request)
        yield client


async def rest(client: socket.socket) -> bytes:
    """What is still to be read, until the server hangs up, or breaks the connection off."""
    data = b""
    try:
        while more := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
            data += more
    except ConnectionResetError:
        pass
    return data


@pytest.fixture
def folder(adapters: dict[str, Path], tmp_path: Path) -> Path:
    made = tmp_path / "adapters"
    made.mkdir()
    for name, path in adapters.items():
        shutil.copy(path, made / f"{name}.gguf")
    return made


def blocked(http: HttpServer) -> list[Any]:
    """Connections whose system takes no more of what they are to send."""
    return [each for each in http.server_state.connections if each.transport.get_write_buffer_size()]  # type: ignore[union-attr]


def test_who_does_not_read_stalls_nobody(base: Path, folder: Path, small: None) -> None:
    async def go() -> None:
        async with narrow(base, folder, 60.0) as (http, url, server), httpx.AsyncClient(timeout=60) as others:

            async def said(name: str) -> str:
                return text_of(await others.post(f"{url}/v1/chat/completions", json=asked(name)))

            want = {name: await said(name) for name in NAMES}
            memory = psutil.Process().memory_info().rss
            async with long_reply(url, stream=True) as client:
                await until(lambda: len(blocked(http)) == 1)
                assert await asyncio.gather(*map(said, NAMES * 4)) == [want[name] for name in NAMES * 4]
                (connection,) = blocked(http)
                await until(lambda: not server.engine._pending)  # the engine has done with it: its place is free
                assert connection in blocked(http)
                assert 0 < connection.transport.get_write_buffer_size() < MOST_UNSENT
                assert psutil.Process().memory_info().rss - memory < 64 << 20
                assert b"data: [DONE]" in await rest(client)  # it had only to read

    asyncio.run(asyncio.wait_for(go(), 60))


def test_of_who_reads_slowly_the_system_tells_in_time() -> None:
    """With the megabytes that it would buffer of itself, it tells of a reader like this every 9 s."""
    size, bite, pause = 8 << 20, 1 << 14, 0.1

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(size)})

    async def go() -> None:
        patient = type("Patient", (Connection,), {"unread_seconds": 3.0})
        listening = socket.create_server(("127.0.0.1", 0))
        http = uvicorn.Server(uvicorn.Config(large, http=patient, lifespan="off", log_config=None))
        serving = asyncio.create_task(http.serve(sockets=[listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname(), limit=bite)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        taken = 0
        for _ in range(40):
            taken += len(await reader.read(bite))
            await asyncio.sleep(pause)
        while more := await reader.read(1 << 20):
            taken += len(more)
        writer.close()
        http.should_exit = True
        await serving
        assert taken > size

    asyncio.run(asyncio.wait_for(go(), 60))


def test_who_takes_nothing_is_given_up(base: Path, folder: Path, small: None) -> None:
    async def go() -> None:
        async with narrow(base, folder, 0.5) as (http, url, server), long_reply(url, stream=True) as client:
            await until(lambda: bool(blocked(http)))
            await until(lambda: not http.server_state.connections and not server.under_way)
            assert b"data: [DONE]" not in await rest(client)

    asyncio.run(asyncio.wait_for(go(), 60))


def test_who_reads_slowly_is_waited_for(base: Path, folder: Path, small: None) -> None:
    async def go() -> None:
        async with narrow(base, folder, 2.0) as (http, url, _), long_reply(url, stream=False) as client:
            await until(lambda: len(blocked(http)) == 1)
            (connection,) = blocked(http)
            data = b""
            for _ in range(20):  # for longer than nothing may be taken
                await asyncio.sleep(0.2)
                data += await asyncio.get_running_loop().sock_recv(client, 2 * SMALL)
            assert connection in blocked(http)
            _, _, answer = (data + await rest(client)).partition(b"\r\n\r\n")
            assert json.loads(answer)["usage"]["completion_tokens"] == ENDLESS["max_tokens"]

    asyncio.run(asyncio.wait_for(go(), 60))


@contextmanager
def file_limit(soft: int) -> Iterator[None]:
    """How many files this process, and those that it starts, may have open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def idle(served: Served, count: int) -> Iterator[None]:
    """So many connections that are kept alive after a request, and say no more."""
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    connections = list[socket.socket]()
    try:
        for _ in range(count):
            connections.append(socket.create_connection((host, int(port)), 30))
            connections[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in connections)
        yield
    finally:
        for connection in connections:
            connection.close()


def test_a_thousand_idle_connections_cost_little(base: Path, folder: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * IDLE:
        pytest.skip(f"this system lets a process have {hard} files")
    with file_limit(256), serving(base, folder) as served, file_limit(2 * IDLE):
        process = psutil.Process(served.process.pid)
        said = {name: text_of(served.post("/v1/chat/completions", asked(name))) for name in NAMES}
        memory = process.memory_info().rss
        with idle(served, IDLE), ThreadPoolExecutor(4) as pool:
            assert process.num_fds() > IDLE
            asks = [pool.submit(served.post, "/v1/chat/completions", asked(name)) for name in NAMES * 4]
            assert [text_of(each.result()) for each in asks] == [said[name] for name in NAMES * 4]
            assert process.memory_info().rss - memory < 64 << 20
        served.until(lambda: process.num_fds() < 100)
    assert "may have" not in served.log.read_text()


def test_too_few_files_are_told_and_those_who_came_first_are_served(base: Path, folder: Path, tmp_path: Path) -> None:
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nulimit -n 100\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.edgelora.serve.conftest.sys.executable", str(wrapper))
        with serving(base, folder) as served:
            told = f"may have 100 files open, connections included; more wait until others end. `ulimit -n {FILES}`"
            assert told in served.log.read_text()
            with idle(served, 40):
                assert text_of(served.post("/v1/chat/completions", asked("red")))
