"""What a server is started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelora.adapter_ref import AdapterRef

MEGABYTE = 1 << 20
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeSettings:
    """See `edgelora serve --help`.

    Attributes:
        engine: what `Engine` is made with, as JSON.
        adapters: those named on the command line.
        adapter_dir: a folder whose GGUF files are adapters, and the only place that clients can name files in.
        keys: None lets everybody in, from this machine only.
        max_waiting: requests that wait before more are refused.
        grace: seconds in which replies under way may end once the server is told to.
        max_body, max_upload: of a request, in bytes.
        request_seconds: the longest that any reply may take.
        silent_seconds, step_seconds: after which the engine's process counts as hanging, and is started again: without
            an answer, and in one step of its engine.
        unread_seconds: in which a client that is sent something has to take some of it.
        require_verify: uploads replay their certificate first.
        origins: web origins other than this server's own that browsers may call from.
    """

    base: Path
    engine: Mapping[str, Any] = field(default_factory=dict)
    adapters: tuple[AdapterRef, ...] = ()
    adapter_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    keys: Path | None = None
    max_waiting: int = 64
    grace: float = 30.0
    max_body: int = 8 * MEGABYTE
    max_upload: int = 2048 * MEGABYTE
    request_seconds: float = 600.0
    silent_seconds: float = 30.0
    step_seconds: float = 600.0
    unread_seconds: float = 60.0
    require_verify: bool = False
    origins: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        return self.host in LOOPBACK
