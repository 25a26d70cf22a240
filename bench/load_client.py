"""A client that streams completions from an OpenAI-shaped server and knows what became of each. It is kept cheap: it
shares the cores with what it measures."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from dataclasses import dataclass
from typing import Any

import httpx

JSON = {"Content-Type": "application/json"}
REQUEST_SECONDS, SLOW_SECONDS = 300, 3


@dataclass
class Answer:
    """What came for one request; `problem` says why it is no answer."""

    status: int = 0
    text: str = ""
    tokens: int = 0
    reason: str | None = None
    problem: str = ""
    refused: int = 0
    first: float = 0.0
    seconds: float = 0.0


class Client:
    """The side that asks: one connection pool, and for slow readers another whose windows are small.

    Args:
        keep: use connections again; llama-server hangs up after a hundred requests, now and then on one just sent.
    """

    def __init__(self, url: str, seed: int, *, keep: bool = True) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None if keep else 0)
        options: dict[str, Any] = {"base_url": url, "timeout": REQUEST_SECONDS, "headers": JSON}
        self._fast = httpx.AsyncClient(limits=limits, **options)
        small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)]
        transport = httpx.AsyncHTTPTransport(limits=limits, socket_options=small)
        self._slow = httpx.AsyncClient(transport=transport, **options)
        self.rng = random.Random(seed)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._fast.aclose()
        await self._slow.aclose()

    async def get(self, path: str) -> Any:
        return (await self._fast.get(path)).json()

    async def whole(self, model: str, prompt: str, max_tokens: int, **more: Any) -> Any:
        """The one choice of an answer in one piece."""
        more |= {"stream": False, "stream_options": None}
        response = await self._fast.post("/v1/completions", content=body(model, prompt, max_tokens, **more))
        return response.raise_for_status().json()["choices"][0]

    async def ask(self, body: bytes, *, slow: bool = False, leave_after: float = 0.0, until: float = 0.0) -> Answer:
        """One request to its end; a refused one is sent again when the server said, until `until`.

        Args:
            slow: read with pauses, `SLOW_SECONDS` in all.
            leave_after: hang up so many seconds after the first token.
        """
        refused = 0
        while True:
            answer = await self._once(body, slow, leave_after)
            answer.refused = refused
            if answer.status not in (429, 503) or answer.problem:
                return answer
            answer.refused = refused = refused + 1
            wait = float(answer.reason or 1) * self.rng.uniform(1.0, 1.5)
            if time.perf_counter() + wait > until:
                return answer
            await asyncio.sleep(wait)

    async def _once(self, body: bytes, slow: bool, leave_after: float) -> Answer:
        answer, parts, began = Answer(), list[bytes](), time.perf_counter()
        client = self._slow if slow else self._fast
        left, paused = False, 0.0
        try:
            async with client.stream("POST", "/v1/completions", content=body) as response:
                answer.status = response.status_code
                async for part in response.aiter_raw():
                    if not parts:
                        answer.first = time.perf_counter() - began
                    parts.append(part)
                    if leave_after and response.status_code == 200:
                        await asyncio.sleep(leave_after)
                        left = True
                        break
                    if slow and paused < SLOW_SECONDS:
                        paused += (pause := self.rng.uniform(0.05, 0.3))
                        await asyncio.sleep(pause)
                retry_after = response.headers.get("retry-after")
        except httpx.HTTPError as error:
            answer.problem = f"no answer: {error!r}"
            return answer
        answer.seconds = time.perf_counter() - began
        data = b"".join(parts)
        if answer.status != 200:
            answer.text = data.decode("utf-8", "replace")
            answer.reason = retry_after
            if answer.status in (429, 503) and not retry_after:
                answer.problem = f"{answer.status} without Retry-After"
        elif data.startswith(b"data:"):
            _read_stream(answer, data, left)
        else:
            _read_choice(answer, json.loads(data))
        return answer


def _read_stream(answer: Answer, data: bytes, left: bool) -> None:
    """The events of a stream. One that was not left has to come to its end."""
    events = [event for event in data.split(b"\n\n") if event.startswith(b"data:")]
    if left:
        events = events[:-1] if not data.endswith(b"\n\n") else events
    elif not events or events.pop()[5:].strip() != b"[DONE]":
        answer.problem = f"a stream without an end: ...{data[-200:]!r}"
        return
    for event in events:
        if event[5:].strip() != b"[DONE]":
            _read_choice(answer, json.loads(event[5:]))
    if not left and answer.reason is None:
        answer.problem = f"a stream without a finish_reason: ...{data[-200:]!r}"


def _read_choice(answer: Answer, message: dict[str, Any]) -> None:
    if "error" in message:
        answer.problem = f"an error inside the answer: {message['error']}"
        return
    for choice in message["choices"]:
        answer.text += choice["text"]
        answer.reason = choice["finish_reason"] or answer.reason
    if message.get("usage"):
        answer.tokens = message["usage"]["completion_tokens"]


def body(model: str, prompt: str, max_tokens: int, **more: Any) -> bytes:
    fields = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    fields["stream_options"] = {"include_usage": True}
    return json.dumps({**fields, **more}).encode()
