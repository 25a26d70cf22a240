"""Connections that cost little: many at once that say nothing, and those of clients that do not read."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("edgelora.serve")

FILES, FEW_FILES = 8192, 1200
"""How many files and connections this process asks the system for, and with how few it says so."""


class Connection(H11Protocol):
    """HTTP/1.1, given up where the client takes nothing of what it is sent for `unread_seconds`.

    What the system has no room for holds whoever writes the answer back at once: of a reply that is not read, the
    server has in memory what the engine has written, at most a context window of it, and the engine has done with it.

    Attributes:
        send_bytes: what the system has room for. It tells that something was taken once a third is: of the megabytes
            that it would grow to, who reads slowly needs minutes for that, and a thousand who do not read gigabytes.
    """

    send_bytes: ClassVar[int] = 1 << 17
    unread_seconds: ClassVar[float] = 60.0
    _giving_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_bytes)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        self._stop_waiting()
        super().resume_writing()

    def _wait(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._giving_up = self.loop.call_later(self.unread_seconds, self._look_again, unsent)

    def _stop_waiting(self) -> None:
        if self._giving_up:
            self._giving_up.cancel()
            self._giving_up = None

    def _look_again(self, before: int) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent < before:
            self._wait()
            return
        client = self.client[0] if self.client else "a client"
        log.warning("%s took nothing of %d bytes for %g s; it is given up", client, unsent, self.unread_seconds)
        self.transport.abort()


def raise_file_limit() -> None:
    """Let this process have many connections: raise its limit as far as it may, and tell where that is too low."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < FILES:
        soft = FILES if hard == unlimited else min(FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != unlimited and soft < FEW_FILES:
        log.warning(
            "this process may have %d files open, connections included; more wait until others end. "
            "`ulimit -n %d` before the start, or LimitNOFILE= of the service, lets it have more",
            soft,
            FILES,
        )
