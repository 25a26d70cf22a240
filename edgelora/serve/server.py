"""What the routes share: the engine's process, the adapters, who may ask, and what it all amounts to."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request

from edgelora.adapter_ref import BASE_NAMES
from edgelora.errors import EdgeloraError
from edgelora.serve.keys import Key, KeyRing
from edgelora.serve.limits import Limits
from edgelora.serve.metrics import Metrics
from edgelora.serve.problems import ApiError, unknown_model
from edgelora.serve.process import READY, EngineProcess
from edgelora.serve.registry import Registry
from edgelora.serve.settings import LOOPBACK, ServeSettings
from edgelora.serve.usage import SAVE_SECONDS, UsageFile

log = logging.getLogger("edgelora.serve")
RATE_SECONDS = 10.0
"""Over which tokens a second are told."""
Blend = str | dict[str, float] | None
"""What a request's `adapter` is: a name, names with scales, or the bare base."""


class Server:
    """One server's state. Lives on its event loop.

    Args:
        settings: what it was started with.

    Raises:
        SettingsError: the key file cannot be read.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.keys = None if settings.keys is None else KeyRing.read(settings.keys)
        self._usage = None if settings.keys is None else UsageFile(settings.keys)
        self.limits = self._usage.restored() if self._usage else Limits()
        self.metrics = Metrics()
        self.registry = Registry(settings.adapters, settings.adapter_dir)
        options = {**settings.engine, "base": str(settings.base), "max_waiting": settings.max_waiting}
        self.engine = EngineProcess(
            options,
            self.registry.restore,
            self._on_death,
            silent_seconds=settings.silent_seconds,
            step_seconds=settings.step_seconds,
        )
        self.registry.engine = self.engine
        self.is_ending = False
        self.embedding = 0  # requests for vectors that the engine has not answered
        self.started = int(time.time())
        self._tokens: deque[tuple[float, int]] = deque(maxlen=100_000)

    async def start(self) -> None:
        """Start the engine, and load the adapters.

        Raises:
            EdgeloraError: the base cannot be loaded.
        """
        await self.engine.start()
        for notice in self.engine.description["notices"]:
            log.warning("%s", notice)

    async def stop(self) -> None:
        await self.engine.stop()
        self.save_usage()

    async def keep_usage(self) -> None:
        """Save what the keys have used now and then, until cancelled."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            self.save_usage()

    def save_usage(self) -> None:
        if self._usage:
            self._usage.save(self.limits)

    def reload_keys(self) -> None:
        """Read the key file again; a broken one changes nothing."""
        if self.settings.keys is None:
            return
        try:
            self.keys = KeyRing.read(self.settings.keys)
        except EdgeloraError as error:
            log.error("the old keys stay: %s", error.message)
        else:
            log.info("keys read again")

    @property
    def base_id(self) -> str:
        """The base as a model's name."""
        return Path(self.settings.base).stem

    @property
    def base_fingerprint(self) -> str:
        return str(self.engine.description.get("base_fingerprint", ""))

    @property
    def under_way(self) -> int:
        return self.engine.under_way

    @property
    def is_ready(self) -> bool:
        return self.engine.state == READY and not self.is_ending

    def authenticate(self, request: Request, *, admin: bool = False) -> Key | None:
        """Whose request it is; None where the server has no keys.

        Raises:
            ApiError: 401 without a known key, 403 for what only an admin's key may do.
        """
        self._check_host(request)
        if self.keys is None:
            if admin:
                raise ApiError(403, "This needs an admin key, and so a server with --keys", code="no_keys")
            return None
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        key = self.keys.find(secret.strip()) if scheme.lower() == "bearer" and secret.strip() else None
        if key is None:
            raise ApiError(
                401,
                "Incorrect API key provided",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if admin and not key.admin:
            raise ApiError(403, "This key may not manage adapters", code="not_admin")
        return key

    def _check_host(self, request: Request) -> None:
        """A server that lets everybody on this machine in must not be asked by web pages under another name (DNS
        rebinding)."""
        host = request.headers.get("host", "").rsplit(":", 1)[0].strip("[]")
        if self.keys is None and host not in LOOPBACK:
            raise ApiError(403, "Without keys, this server answers to localhost only", code="wrong_host")

    def resolve(self, model: str, blend: Mapping[str, float] | None, key: Key | None) -> tuple[Blend, str]:
        """What a request's `model` stands for: the engine's `adapter`, and a label for figures.

        `base`, the base's own id, an adapter's name, or `base:adapter`; a blend goes with the base or one of its parts.

        Raises:
            ApiError: 404 for what does not exist, or is not this key's.
        """
        name = self.named(model)
        names = [*blend] if blend else []
        for each in {name or "base", *names}:
            self._check_may(each, key, model)
        if blend:
            acting = {each: scale for each, scale in blend.items() if not self._is_base(each)}
            return acting or None, "+".join(sorted(names))
        return name, name or "base"

    def named(self, model: str) -> str | None:
        """The adapter that a request's `model` names; None for the base."""
        head, colon, tail = model.partition(":")
        name = tail if colon and self._is_base(head) else model
        return None if self._is_base(name) else name

    def visible(self, key: Key | None) -> list[str]:
        """Names of the adapters that a key may know of."""
        return [entry.name for entry in self.registry if _may(key, entry.name)]

    def may_base(self, key: Key | None) -> bool:
        return _may(key, "base")

    def _is_base(self, name: str) -> bool:
        return name in BASE_NAMES or name == self.base_id

    def _check_may(self, name: str, key: Key | None, model: str) -> None:
        if self._is_base(name):
            if not self.may_base(key):
                raise unknown_model(model)
            return
        if not _may(key, name):
            raise unknown_model(model)
        self.registry.get(name)

    def wrote(self, tokens: int) -> None:
        """So many tokens were written just now."""
        self._tokens.append((time.monotonic(), tokens))

    def status(self, state: Mapping[str, Any] | None, key: Key | None) -> dict[str, Any]:
        """The load at a glance; of the adapters only those that a key may know of."""
        now = time.monotonic()
        while self._tokens and self._tokens[0][0] < now - RATE_SECONDS:
            self._tokens.popleft()
        told: Mapping[str, Any] = state or {"running": 0, "waiting": 0, "adapters_in_memory": []}
        return {
            "state": "ending" if self.is_ending else self.engine.state,
            "running": told["running"],
            "waiting": told["waiting"],
            "tokens_per_second": round(sum(tokens for _, tokens in self._tokens) / RATE_SECONDS, 1),
            "adapters_in_memory": sum(_may(key, name) for name in told["adapters_in_memory"]),
            "restarts": self.engine.restarts,
        }

    async def engine_state(self) -> dict[str, Any] | None:
        """What the engine says of itself, and its gauges; None while there is none."""
        try:
            state: dict[str, Any] = await self.engine.call("state")
        except EdgeloraError:
            state = {}
        figures = self.metrics
        figures.up.set(self.engine.state == READY)
        figures.restarts.set(self.engine.restarts)
        if state:
            figures.waiting.set(state["waiting"])
            figures.running.set(state["running"])
            figures.in_memory.set(len(state["adapters_in_memory"]))
            figures.adapter_bytes.set(state["adapter_bytes"])
        return state or None

    def _on_death(self, how: str, suspects: frozenset[str]) -> None:
        self.registry.died(suspects)


def _may(key: Key | None, name: str) -> bool:
    return key is None or key.may_use(name)


async def read_json(request: Request, most: int) -> Any:
    """A request's body.

    Raises:
        ApiError: 413 for more than `most` bytes, 415 or 400 for what is no JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a web page may send elsewhere without asking is not this
        raise ApiError(415, "The body has to be JSON: Content-Type: application/json", code="unsupported_media_type")
    data = b"".join([part async for part in body_parts(request, most)])
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON", code="invalid_json") from None


async def body_parts(request: Request, most: int, what: str = "body") -> AsyncIterator[bytes]:
    """A request's body as it comes.

    Raises:
        ApiError: 413 for more than `most` bytes, 400 for one that ends early.
    """
    too_large = ApiError(413, f"The {what} is larger than {most} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length) > most:
        raise too_large
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large
            yield part
    except ClientDisconnect:
        raise ApiError(400, f"The {what} ended early", code="disconnected") from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)
