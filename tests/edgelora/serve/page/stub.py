"""A server that answers the page as `edgelora serve` does, with scripted replies: to test the page and to work on it.

python -m tests.edgelora.serve.page.stub 8090    # then open http://127.0.0.1:8090/
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import edgelora.serve
from edgelora.serve.app import PAGE_HEADERS

PAGE = Path(edgelora.serve.__file__).parent / "page"

# Each adapter's answer, as tokens.
_TEXTS = {
    "support": "The| battery| of| your| Lumo| lamp| lasts| 12| hours|.| A| full| charge| takes| 3| hours|.",
    "extract": 'The| battery| lasts| 12| hours| of| light|,| says| {"|battery|":| "|12| h|"}|.',
    "base": "I| do| not| know| about| that|.| Ask| me| about| Fennick|.",
}
REPLIES: dict[str, tuple[str, ...]] = {name: tuple(text.split("|")) for name, text in _TEXTS.items()}


def listed(name: str, **more: Any) -> dict[str, Any]:
    is_base = name == "base"
    about = {"scale": 1.0, "system": "", "sampling": {}, "content_hash": "9f3a" * 16, "state": "ready", "problem": ""}
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "edgelora",
        "root": "fennick-2.6m-q8_0.gguf" if is_base else f"{name}.gguf",
        "parent": None if is_base else "base",
        "edgelora": about | more,
    }


@dataclass
class Stub:
    """What the server does next; a test sets it, and reads what was asked.

    Attributes:
        replies: the tokens that each model answers with.
        pause: seconds between two tokens.
        cut_after: tokens after which a reply ends with an error, as when the engine's process dies.
        key: what requests have to carry; "" asks for none.
        reachable: whether /status answers at all.
        asked: bodies of the chat completions, in order.
        given_up: how many replies were left by their reader before the end.
    """

    replies: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(REPLIES))
    models: list[dict[str, Any]] = field(
        default_factory=lambda: [
            listed("base"),
            listed("support", system="You answer questions about the Lumo lamp.", sampling={"temperature": 0}),
            listed("extract", scale=0.8, sampling={"temperature": 0, "max_tokens": 96}),
            listed("broken", state="refused", problem="blk.0.attn_q is 2048x2048 here and 4096x4096 in the base"),
        ]
    )
    status: dict[str, Any] = field(
        default_factory=lambda: {
            "state": "ready",
            "running": 3,
            "waiting": 1,
            "tokens_per_second": 41.2,
            "adapters_in_memory": 2,
            "restarts": 0,
        }
    )
    pause: float = 0.0
    cut_after: int | None = None
    key: str = ""
    reachable: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    given_up: int = 0
    url: str = ""

    def app(self) -> Starlette:
        routes = [
            Route("/status", self._status),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=self._guarded)])

    async def _guarded(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        is_api = request.url.path.startswith(("/v1/", "/status"))
        if self.key and is_api and request.headers.get("authorization") != f"Bearer {self.key}":
            return _problem(401, "Incorrect API key provided", "invalid_api_key")
        response = await call_next(request)
        response.headers.update(PAGE_HEADERS)
        return response

    async def _status(self, _: Request) -> Response:
        return JSONResponse(self.status) if self.reachable else _problem(502, "Bad gateway", "bad_gateway")

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self.models})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if self.status["state"] != "ready":
            return _problem(503, "The engine is restarting; try again in 2 seconds", "engine_restarting")
        if body["model"] not in self.replies:
            return _problem(404, f"The model {body['model']!r} does not exist", "model_not_found")
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        tokens = self.replies[body["model"]][: body.get("max_tokens")]
        try:
            for at, token in enumerate(tokens):
                if at == self.cut_after:
                    lost = {
                        "message": "The engine died while it answered",
                        "type": "server_error",
                        "code": "engine_died",
                    }
                    yield f"data: {json.dumps({'error': lost})}\n\n"
                    return
                choice: dict[str, Any] = {"index": 0, "delta": {"content": token}, "finish_reason": None}
                if body.get("logprobs"):
                    choice["logprobs"] = {"content": [_logprobs(token, at)]}
                yield _event(choices=[choice])
                await asyncio.sleep(self.pause)
            yield _event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
            used = {"prompt_tokens": 20, "completion_tokens": len(tokens), "total_tokens": 20 + len(tokens)}
            yield _event(choices=[], usage=used)
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.given_up += 1
            raise


def _event(**fields: Any) -> str:
    return f"data: {json.dumps({'id': 'chatcmpl-1', 'object': 'chat.completion.chunk', 'created': 0, **fields})}\n\n"


def _problem(status: int, message: str, code: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "", "param": None, "code": code}}, status)


def _logprobs(token: str, at: int) -> dict[str, Any]:
    """The chosen token with 80 % in every third place and 100 % less a little elsewhere, and four others."""
    chosen = 0.8 if at % 3 == 0 else 0.97
    others = [" lamp", " light", " the", " 10"]
    shares = [0.5, 0.3, 0.15, 0.04]
    top = [(token, chosen), *((other, (1 - chosen) * share) for other, share in zip(others, shares, strict=True))]
    alternatives = [{"token": text, "logprob": math.log(p), "bytes": list(text.encode())} for text, p in top]
    return alternatives[0] | {"top_logprobs": alternatives}


@contextmanager
def served(stub: Stub) -> Iterator[Stub]:
    """The stub on a free loopback port, in a thread; its `url` says where."""
    server = uvicorn.Server(uvicorn.Config(stub.app(), port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the stub did not start")
            thread.join(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        stub.url = f"http://127.0.0.1:{port}/"
        yield stub
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    uvicorn.run(Stub(pause=0.1).app(), port=int(sys.argv[1]))
