"""The engine's process, seen from the server: started, talked to, and started again when it dies or hangs.

Everything here runs on the server's event loop. A reply under way when the process dies ends with `EngineDiedError`;
what comes before it is back gets `EngineDownError`, which says how long that takes. Adapters are loaded again before
anything else is let in. One that hangs (see `pulse`) is killed, and so dies like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgelora.engine.stream import Request, TokenLogprob
from edgelora.errors import EdgeloraError
from edgelora.serve import protocol
from edgelora.serve.pulse import Pulse

log = logging.getLogger("edgelora.serve")

STARTING, READY, RESTARTING, STOPPED = "starting", "ready", "restarting", "stopped"
PAUSES = (0.0, 0.5, 2.0, 8.0, 30.0)
"""Seconds before another start, by how many in a row came to nothing."""
NATIVE = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""How a process ends that llama.cpp or a kernel took down: those who were being computed are suspects."""
EXIT_SECONDS = 10.0
_SIGNALS = {int(number): number.name for number in signal.Signals}  # real-time ones have no names


class EngineDownError(EdgeloraError):
    """There is no engine now. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = max(1.0, retry_after)


class EngineDiedError(EdgeloraError):
    """The engine's process ended while it worked on this."""


@dataclass(frozen=True)
class Piece:
    """Text of a reply, and its tokens' log probabilities where they were asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


Late = Callable[[Mapping[str, Any] | None], None]
"""Told the account of a reply that was cancelled, once it has one; None where there is none."""


@dataclass
class _Pending:
    """Something that was asked for, and what came of it so far."""

    adapters: frozenset[str] = frozenset()
    late: Late | None = None
    items: asyncio.Queue[dict[str, Any] | EdgeloraError] = field(default_factory=asyncio.Queue)


class Reply:
    """One reply: iterate over its pieces, then look at `account`. Whoever does not read it to its end cancels it."""

    def __init__(self, engine: EngineProcess, number: int, pending: _Pending) -> None:
        self._engine, self._number, self._pending = engine, number, pending
        self.account: dict[str, Any] = {}

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises: what went wrong, as the engine says it, or `EngineDiedError`."""
        while True:
            item = await self._pending.items.get()
            if isinstance(item, EdgeloraError):
                raise item
            if "piece" in item:
                logprobs = tuple(protocol.logprob_of(each) for each in item.get("logprobs", ()))
                yield Piece(item["piece"], logprobs)
            elif "error" in item:
                raise protocol.error_of(item["error"])
            else:
                self.account = item["result"]
                return

    def cancel(self, late: Late = lambda account: None) -> None:
        """Stop writing. Its place is free within a step, and then what was written is accounted for."""
        self._engine.forget(self._number, self._pending, late)


class EngineProcess:
    """See the module.

    Args:
        options: what `Engine` is made with, as JSON.
        restore: loads the adapters that there are to be, after every start.
        on_death: told why, and which adapters are suspects.
        silent_seconds, step_seconds: see `Pulse`.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        restore: Callable[[], Awaitable[None]],
        on_death: Callable[[str, frozenset[str]], None] = lambda reason, suspects: None,
        *,
        silent_seconds: float = 30.0,
        step_seconds: float = 600.0,
    ) -> None:
        self._options, self._restore, self._on_death = dict(options), restore, on_death
        self._bounds = silent_seconds, step_seconds
        self.state, self.description = STOPPED, dict[str, Any]()
        self.restarts = 0
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._loading: str | None = None
        self._computed = frozenset[str]()  # adapters at work when the process said its last
        self._hang = ""
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._load_seconds: deque[float] = deque([5.0], maxlen=3)
        self._restarting_since = 0.0

    async def start(self) -> None:
        """Start the process, and wait until it can answer. Where an adapter takes it down, it is started again.

        Raises:
            EdgeloraError: the base cannot be loaded.
        """
        self.state = STARTING
        for pause in PAUSES:
            await asyncio.sleep(pause)
            try:
                await self._launch()
            except (EngineDiedError, EngineDownError) as error:  # the latter: between two adapters
                await self._bury()
                died = error
                continue
            break
        else:
            raise died
        self._keeper = asyncio.create_task(self._keep(), name="engine-keeper")

    async def stop(self) -> None:
        """End the process; what is under way is given up."""
        self.state = STOPPED
        if self._writer:
            self._writer.close()
        for task in (self._keeper, self._watching, self._reading):
            if task:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._process and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), EXIT_SECONDS)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._hang_up()
        self._fail_all(EngineDiedError("the server is being shut down"))

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def under_way(self) -> int:
        """How many replies are asked for and not finished."""
        return sum(bool(each.adapters) for each in self._pending.values())

    def generate(self, request: Request) -> Reply:
        """Ask for a reply.

        Raises:
            EngineDownError: there is no engine now.
            SettingsError: it is too long.
        """
        adapter = request.adapter
        names = [adapter or "none"] if isinstance(adapter, str | None) else list(adapter)
        number, pending = self._ask("generate", protocol.request_fields(request), frozenset(names))
        return Reply(self, number, pending)

    async def call(self, do: str, **arguments: Any) -> Any:
        """Have something done that gives one result.

        Raises:
            EdgeloraError: as the engine says it; EngineDownError, EngineDiedError.
        """
        self._check_up(also=(STARTING, RESTARTING) if do in ("load", "state") else ())
        number, pending = self._send(do, arguments, frozenset())
        try:
            item = await pending.items.get()
        finally:
            self._pending.pop(number, None)
        if isinstance(item, EdgeloraError):
            raise item
        if "error" in item:
            raise protocol.error_of(item["error"])
        return item["result"]

    def forget(self, number: int, pending: _Pending, late: Late) -> None:
        """Nobody waits for this any more."""
        if number in self._pending:
            pending.late = late
            self._write({"id": number, "do": "cancel"})
            return
        told = [item for item in _drained(pending.items) if isinstance(item, dict) and "result" in item]
        late(told[-1]["result"] if told else None)  # it had ended already, unread

    def _ask(self, do: str, arguments: dict[str, Any], adapters: frozenset[str]) -> tuple[int, _Pending]:
        self._check_up()
        return self._send(do, arguments, adapters)

    def _check_up(self, also: tuple[str, ...] = ()) -> None:
        if self.state in (READY, *also) and self._writer is not None:
            return
        left = max(self._load_seconds) - (time.monotonic() - self._restarting_since)
        raise EngineDownError(f"the engine is {self.state}", left)

    def _send(self, do: str, arguments: dict[str, Any], adapters: frozenset[str]) -> tuple[int, _Pending]:
        number, pending = next(self._numbers), _Pending(adapters)
        self._write({"id": number, "do": do, "arguments": arguments})
        self._pending[number] = pending
        return number, pending

    def _write(self, message: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(protocol.line(message))

    async def _launch(self) -> None:
        """One process, with the base and its adapters loaded."""
        began = time.monotonic()
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "edgelora.serve.worker", str(theirs.fileno()), pass_fds=[theirs.fileno()]
            )
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=protocol.MAX_LINE_BYTES)
        self._write(self._options)
        self._opened: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._pulse = Pulse(*self._bounds)
        self._reading = asyncio.create_task(self._read(reader), name="engine-reader")
        self._watching = asyncio.create_task(self._watch(), name="engine-watch")
        opened = await self._opened
        if opened is None:
            raise EngineDiedError(f"the engine's process ended while it started ({await self._how_it_ended()})")
        if opened["event"] == "failed":
            self._hang_up()
            await self._process.wait()
            raise protocol.error_of(opened["error"])
        self.description = opened["result"]
        await self._restore()
        self._load_seconds.append(time.monotonic() - began)
        self.state = READY

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hand out what the process says, until it says no more: whatever was asked of it then comes to nothing."""
        try:
            while data := await _line(reader):
                message = protocol.parsed(data)
                if "event" in message:
                    self._note(message)
                else:
                    self._hand_out(message)
        except Exception:  # what it says is nothing that this server could go on with; hung up on, it ends
            log.exception("the engine's process is not understood")
        computed = (each.adapters for each in self._pending.values())
        self._computed = frozenset(itertools.chain.from_iterable(computed)) - {"none", "base"}
        if not self._opened.done():
            self._opened.set_result(None)
        if self.state != STOPPED:
            self.state, self._restarting_since = RESTARTING, time.monotonic()
            self._hang_up()
            self._fail_all(EngineDiedError("the engine's process ended; it is started again"))

    def _note(self, event: dict[str, Any]) -> None:
        """Something that the process says of itself."""
        match event["event"]:
            case "alive":
                self._pulse.answered(event["turn"])
            case "ready" | "failed":
                self._opened.set_result(event)
            case "loading":
                self._loading = event["name"]
            case "loaded":
                self._loading = None

    def _hand_out(self, message: dict[str, Any]) -> None:
        pending = self._pending.get(message["id"])
        if pending is None:  # of a call that was given up
            return
        if pending.late is None:
            pending.items.put_nowait(message)
        if "piece" not in message:
            del self._pending[message["id"]]
            if pending.late is not None:
                pending.late(message.get("result"))

    async def _watch(self) -> None:
        """Ask the process at every beat whether it works, and kill it where it does no more."""
        while not (hang := self._pulse.beat()):
            self._write({"do": "ping"})
            await asyncio.sleep(self._pulse.interval)
        log.error("the engine's process hangs (%s); it is killed", hang)
        self._hang = hang
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _keep(self) -> None:
        """Start it again whenever it ends."""
        failed = 0
        while True:
            assert self._reading is not None
            await self._reading
            await self._bury()
            while True:
                await asyncio.sleep(PAUSES[min(failed, len(PAUSES) - 1)])
                try:
                    await self._launch()
                # OSError: no memory or file descriptor for a process. EngineBugError: no memory in the process itself.
                except (EdgeloraError, OSError, protocol.EngineBugError) as error:
                    failed += 1
                    log.error("the engine does not start: %s", error)
                    await self._bury()
                    continue
                failed = 0
                break

    async def _bury(self) -> None:
        """The process is gone: those who may have done it are named."""
        how = await self._how_it_ended()
        for task in (self._watching, self._reading):
            if task:
                task.cancel()
                await asyncio.wait([task])
        assert self._process is not None
        suspects = frozenset[str]()
        if self._loading:
            suspects = frozenset({self._loading})
        elif -(self._process.returncode or 0) in NATIVE or self._pulse.is_stuck:
            suspects = self._computed
        self._loading, self._computed, self._hang = None, frozenset(), ""
        self.state = RESTARTING
        self.restarts += 1
        log.error("the engine's process ended (%s); it is started again", how)
        self._on_death(how, suspects)

    def _hang_up(self) -> None:
        if self._writer:
            self._writer.transport.abort()
            self._writer = None

    async def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = await asyncio.wait_for(self._process.wait(), EXIT_SECONDS)
        except TimeoutError:  # it closed its socket, and hangs
            self._process.kill()
            code = await self._process.wait()
        ended = f"signal {_SIGNALS.get(-code, -code)}" if code < 0 else f"exit code {code}"
        return f"{ended}: {self._hang}" if self._hang else ended

    def _fail_all(self, error: EdgeloraError) -> None:
        pending, self._pending = self._pending, {}
        for each in pending.values():
            if each.late is None:
                each.items.put_nowait(error)
            else:
                each.late(None)


def _drained(items: asyncio.Queue[Any]) -> list[Any]:
    return [items.get_nowait() for _ in range(items.qsize())]


async def _line(reader: asyncio.StreamReader) -> bytes:
    """A whole line; empty where the process said its last, be it amid a line or with something of ours unread."""
    try:
        data = await reader.readline()
    except ConnectionError:
        return b""
    return data if data.endswith(b"\n") else b""
