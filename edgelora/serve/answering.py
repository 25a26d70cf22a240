"""From what was asked to the answer: replies side by side, streams that end with their client, files that come in."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from edgelora.engine.stream import Request as EngineRequest
from edgelora.errors import EdgeloraError, EngineBusyError
from edgelora.serve import bodies, replies
from edgelora.serve.keys import Key
from edgelora.serve.limits import Admission, LimitedError
from edgelora.serve.problems import ApiError, of_error
from edgelora.serve.process import EngineDiedError, EngineDownError, Piece, Reply
from edgelora.serve.protocol import EngineBugError
from edgelora.serve.registry import UPLOAD, Entry
from edgelora.serve.server import Server, body_parts

log = logging.getLogger("edgelora.serve")
Result = TypeVar("Result")
IGNORED = "X-Edgelora-Ignored"


def problem_of(error: Exception) -> ApiError:
    """What a client is told of any error on purpose."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LimitedError):
        return ApiError(
            429,
            error.message,
            type="requests",
            code=f"{error.what}_limit_exceeded",
            headers={"Retry-After": str(error.retry_after)},
        )
    if isinstance(error, EngineDownError):
        seconds = str(round(error.retry_after + 0.5))
        return ApiError(
            503,
            "The engine is starting; try again later",
            type="server_error",
            code="engine_starting",
            headers={"Retry-After": seconds},
        )
    if isinstance(error, EngineDiedError):
        return ApiError(
            503,
            "The engine failed while it worked on this; try again",
            type="server_error",
            code="engine_died",
            headers={"Retry-After": "2"},
        )
    if isinstance(error, EngineBugError):
        log.error("in the engine's process: %s", error)
        return ApiError(500, "The server made a mistake", type="server_error", code="internal_error")
    assert isinstance(error, EdgeloraError)
    problem = of_error(error)
    if problem.status >= 500:
        log.error("%s", error.message)
    return problem


def down(server: Server) -> ApiError:
    """Why requests would not be answered now."""
    if server.is_ending:
        return ApiError(503, "The server is ending", type="server_error", code="ending", headers={"Retry-After": "5"})
    return problem_of(EngineDownError(f"the engine is {server.engine.state}", 2.0))


@dataclass
class _Answer:
    """One request at work. Its key has its place back, and its tokens booked, when every reply is accounted for, be it
    after nobody waits for it any more."""

    server: Server
    asked: bodies.Asked
    label: str
    admission: Admission | None
    began: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    replies: list[Reply] = field(default_factory=list)
    open: set[Reply] = field(default_factory=set)
    is_closed: bool = False

    def start(self, request: EngineRequest) -> None:
        """Raises: EngineDownError."""
        reply = self.server.engine.generate(request)
        self.replies.append(reply)
        self.open.add(reply)

    def booked(self, reply: Reply) -> None:
        """A reply was read to its end.

        Raises:
            ApiError: 408, its time was over.
        """
        self._account(reply, reply.account)
        replies.finish_reason(reply.account)

    def close(self) -> None:
        """Nobody waits for more."""
        self.is_closed = True
        for reply in list(self.open):
            reply.cancel(partial(self._account, reply))
        self._release()

    def _account(self, reply: Reply, account: Mapping[str, Any] | None) -> None:
        if reply in self.open and account:
            self.tokens += account["prompt_tokens"] + account["completion_tokens"]
            self.server.metrics.finished(self.label, account, time.perf_counter() - self.began)
        self.open.discard(reply)
        self._release()

    def _release(self) -> None:
        if self.is_closed and not self.open and self.admission:
            self.admission.done(self.tokens)


async def answer(server: Server, request: Request, asked: bodies.Asked, key: Key | None) -> Response:
    """The whole of a completion's request, streamed or not."""
    if server.is_ending:
        raise down(server)
    adapter, label = server.resolve(asked.model, asked.blend, key)
    asked.check_blend(server.named(asked.model))
    admission = server.limits.enter(key) if key else None
    at_work = _Answer(server, asked, label, admission)
    try:
        tenant = None if key is None else key.name
        longest = server.settings.request_seconds
        for each in asked.requests(adapter, tenant=tenant):
            wanted = replace(
                each,
                deadline=min(each.deadline or longest, longest),
                tools=asked.tools,
                tool_choice=asked.tool_choice,
                parallel_tool_calls=asked.parallel_tool_calls is not False,
            )
            at_work.start(wanted)
    except BaseException as error:
        at_work.close()
        _note_failure(at_work, error)
        raise
    shape = replies.shape_of(asked, server.base_fingerprint)
    ignored = ", ".join(filter(None, asked.ignored))  # a name may be empty, and a header may not end in a space
    headers = {IGNORED: ignored} if ignored else {}
    if asked.stream:
        events = _events(at_work, shape)
        try:  # an error before the first event has a status of its own
            first = await _while_connected(request, asyncio.ensure_future(anext(events)))
        except BaseException:
            await events.aclose()
            raise
        return StreamingResponse(_after(first, events), media_type="text/event-stream", headers=_unbuffered(headers))
    try:
        finished = await _while_connected(request, asyncio.gather(*(_whole(at_work, each) for each in at_work.replies)))
    except BaseException as error:
        _note_failure(at_work, error)
        raise
    finally:
        at_work.close()
    return JSONResponse(shape.whole(finished), headers=headers)


async def _whole(at_work: _Answer, reply: Reply) -> replies.Finished:
    """A reply to its end."""
    pieces = list[Piece]()
    async for piece in reply:
        pieces.append(piece)
        at_work.server.wrote(1)
    at_work.booked(reply)
    text = "".join(piece.text for piece in pieces)
    logprobs = [token for piece in pieces for token in piece.logprobs]
    return replies.Finished(text, logprobs, reply.account)


async def _events(at_work: _Answer, shape: replies.Shape) -> AsyncGenerator[bytes]:
    """The server-sent events of all its replies, as they come. An error ends them with an event of its own."""
    started = at_work.replies
    queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def follow(index: int, reply: Reply) -> None:
        try:
            async for piece in reply:
                queue.put_nowait((index, piece))
            at_work.booked(reply)
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    following = [asyncio.create_task(follow(index, reply)) for index, reply in enumerate(started)]
    left, began = len(following), False
    try:
        while left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                _note_failure(at_work, item)
                problem = problem_of(item)
                if not began:
                    raise problem
                yield replies.sse(problem.body)
                return
            if not began:
                began = True
                for event in shape.opening():
                    yield replies.sse(event)
            if item is None:
                left -= 1
                for event in shape.closing(index, started[index].account):
                    yield replies.sse(event)
            else:
                at_work.server.wrote(1)
                for event in shape.piece(index, item.text, item.logprobs):
                    yield replies.sse(event)
        for event in shape.usage([reply.account for reply in started]):
            yield replies.sse(event)
        yield replies.DONE
    finally:
        for task in following:
            task.cancel()
        at_work.close()


async def _after(first: bytes, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    try:
        yield first
        async for event in events:
            yield event
    finally:
        await events.aclose()


def _unbuffered(headers: dict[str, str]) -> dict[str, str]:
    return {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _while_connected(request: Request, work: asyncio.Future[Result]) -> Result:
    """What `work` gives; given up where the client goes."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    leaving = asyncio.create_task(gone())
    try:
        waiting: set[asyncio.Future[Any]] = {work, leaving}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "The client went away", code="disconnected")
        return await work
    finally:
        leaving.cancel()
        work.cancel()
        with suppress(BaseException):
            await work


def _note_failure(at_work: _Answer, error: BaseException) -> None:
    if isinstance(error, ApiError) and error.code == "timeout":  # its account has said so
        return
    outcome = problem_of(error).code or "error" if isinstance(error, (ApiError, EdgeloraError)) else "error"
    at_work.server.metrics.failed(at_work.label, outcome)


async def embed(server: Server, asked: bodies.AskedEmbeddings, key: Key | None) -> Response:
    """Vectors of texts: one request after the other, and no more wait than may."""
    adapter, label = server.resolve(asked.model, None, key)
    if server.embedding > server.settings.max_waiting:
        raise EngineBusyError(f"{server.embedding} requests for vectors wait")
    admission = server.limits.enter(key) if key else None
    used = 0
    server.embedding += 1
    try:
        result = await server.engine.call("embed", inputs=asked.inputs, adapter=adapter)
        used = result["tokens"]
    except EdgeloraError as error:
        server.metrics.failed(label, problem_of(error).code or "error")
        raise
    finally:
        server.embedding -= 1
        if admission:
            admission.done(used)
    return JSONResponse(replies.embeddings(asked, result["vectors"], used))


async def upload(server: Server, request: Request, name: str, if_generation: int | None) -> Entry:
    """A GGUF file into the folder, under NAME.gguf once it is whole and was checked.

    Raises:
        ApiError: too large, refused, another generation, or no room on the disk.
    """
    folder = server.registry.folder
    if folder is None:
        raise ApiError(400, "This server was started without --adapter-dir")
    server.registry.check_generation(name, if_generation)
    partial = folder / f".{name}.{uuid.uuid4().hex}{UPLOAD}"
    try:
        await _receive(request, partial, server.settings.max_upload)
        await server.registry.check(partial, server.settings.base if server.settings.require_verify else None)
        return await server.registry.load(name, folder / f"{name}.gguf", if_generation=if_generation, incoming=partial)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ApiError(400, "The name is too long for a file", param="lora_name") from None
        log.error("an upload of %s: %s", name, error)
        raise ApiError(507, "There is no room for the file", type="server_error", code="disk_full") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


async def _receive(request: Request, partial: Path, most: int) -> None:
    parts = body_parts(request, most, "file")
    first = await anext(parts, b"")  # what is refused by its length leaves no file
    with open(partial, "xb") as file:
        file.write(first)
        async for part in parts:
            file.write(part)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
