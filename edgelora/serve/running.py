"""A whole server: the engine's process, the folder's watcher, the sockets, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

import uvicorn

from edgelora.errors import SettingsError
from edgelora.serve.app import make_app
from edgelora.serve.connections import Connection, raise_file_limit
from edgelora.serve.server import Server
from edgelora.serve.settings import ServeSettings

log = logging.getLogger("edgelora.serve")
KEEP_ALIVE_SECONDS = 30
FLUSH_SECONDS = 2.0


def run(settings: ServeSettings, on_start: Callable[[str], None] = lambda url: None) -> int:
    """Serve until SIGTERM or SIGINT.

    Args:
        on_start: told the address once requests are answered.

    Returns:
        The exit code: 0 after an orderly end.

    Raises:
        SettingsError: an address that others could reach, without keys.
        EdgeloraError: the base cannot be loaded, or the key file read.
    """
    if settings.keys is None and not settings.is_local:
        raise SettingsError(
            f"without --keys, only this machine may ask; --host is {settings.host}",
            hint="Make a key (edgelora keys add NAME --adapter support) and give --keys keys.toml.",
        )
    return asyncio.run(_run(settings, on_start))


async def _run(settings: ServeSettings, on_start: Callable[[str], None]) -> int:
    raise_file_limit()
    server = Server(settings)
    http = HttpServer(server)
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    loop.add_signal_handler(signal.SIGHUP, server.reload_keys)
    await server.start()
    serving = asyncio.create_task(http.serve(), name="http")
    beside = [asyncio.create_task(server.registry.watch()), asyncio.create_task(server.keep_usage())]
    try:
        while not http.started and not serving.done():
            await asyncio.sleep(0.02)
        if serving.done():
            raise SettingsError(f"{settings.host}:{settings.port} cannot be listened on: it is in use, or not ours")
        port = http.servers[0].sockets[0].getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        on_start(f"http://{host}:{port}")
        waiting = asyncio.create_task(ending.wait())
        await asyncio.wait([waiting, serving], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        log.info("ending: %d replies are under way", server.under_way)
        server.is_ending = True
        http.should_exit = True  # no new connections; keep-alive ones are closed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.grace):
                while server.under_way:
                    await asyncio.sleep(0.05)
    finally:
        for task in beside:
            task.cancel()
        await server.stop()
        http.should_exit = True
        await asyncio.wait([serving], timeout=FLUSH_SECONDS)  # what was given up is told so
        http.force_exit = True
        with contextlib.suppress(asyncio.CancelledError, SystemExit):
            await serving
    return 0


class HttpServer(uvicorn.Server):
    """uvicorn for one server, without its signal handlers: this server decides when it ends."""

    def __init__(self, server: Server) -> None:
        settings = server.settings
        http = type("Connection", (Connection,), {"unread_seconds": settings.unread_seconds})
        config = uvicorn.Config(
            make_app(server),
            host=settings.host,
            port=settings.port,
            http=http,  # h11, which bounds what headers may take
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=None,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield
