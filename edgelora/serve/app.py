"""The routes. Each is short: who asks, what is asked, what the engine is to do, and the answer in OpenAI's shape."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgelora.adapter_ref import check_name
from edgelora.errors import EdgeloraError, SettingsError
from edgelora.serve import answering, bodies, document, replies
from edgelora.serve.problems import ApiError
from edgelora.serve.registry import READY, Entry
from edgelora.serve.server import Server, read_json
from edgelora.version import __version__

log = logging.getLogger("edgelora.serve")
access = logging.getLogger("edgelora.access")
REQUEST_ID, MAX_ID = "X-Request-Id", 64
# Only the page's own files are loaded and run, and no text becomes markup or code.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(server: Server) -> FastAPI:
    """The app of a server."""
    app = FastAPI(title="edgelora", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.server = server
    _add_errors(app)
    _add_models(app, server)
    _add_completions(app, server)
    _add_adapters(app, server)
    _add_health(app, server)
    if server.settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(server.settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(_Noted)
    _add_page(app)
    return app


def _add_page(app: FastAPI) -> None:
    """The page's files, for whatever is no route: mounted, they would answer for routes that have another method."""
    page = StaticFiles(directory=Path(str(files("edgelora.serve") / "page")), html=True, check_dir=False)
    nothing = app.router.not_found

    async def file(scope: Scope, receive: Receive, send: Send) -> None:
        await (page if scope["type"] == "http" else nothing)(scope, receive, send)

    app.router.default = file


class _Noted:
    """Around every request: an id, which the client may have chosen, and a line in the log at its end. HEAD is answered
    as GET, whose body uvicorn leaves out.

    Plain ASGI, so that a stream's disconnection reaches who writes it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # nobody waited for the answer
        given = Headers(scope=scope).get(REQUEST_ID, "")
        number = given if given.isascii() and given.isprintable() and 0 < len(given) <= MAX_ID else uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = number

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = number
                if not scope["path"].startswith("/v1"):
                    headers.update(PAGE_HEADERS)
            await send(message)

        try:
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            await self._app({**scope, "method": method}, receive, noted)
        finally:
            client = scope.get("client")
            fields = {
                "id": number,
                "client": client[0] if client else "",
                "key": scope["state"].get("key"),
                "method": scope["method"],
                "status": status,
                "seconds": round(time.perf_counter() - began, 4),
            }
            access.info("%s", scope["path"], extra={"fields": fields})


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    async def on_api(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return answer(error)

    async def on_edgelora(_request: Request, error: Exception) -> Response:
        assert isinstance(error, EdgeloraError)
        return answer(answering.problem_of(error))

    async def on_http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, str(error.detail), code=None, headers=error.headers)
        return answer(found)

    async def on_bug(request: Request, error: Exception) -> Response:
        log.exception("request %s", getattr(request.state, "id", ""), exc_info=error)
        return answer(ApiError(500, "The server made a mistake", type="server_error", code="internal_error"))

    app.add_exception_handler(ApiError, on_api)
    app.add_exception_handler(EdgeloraError, on_edgelora)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)


def _model(server: Server, entry: Entry | None, *, whole: bool = False) -> dict[str, Any]:
    """An entry of /v1/models; the base for None."""
    description = server.engine.description
    fingerprint = description.get("base_fingerprint", "")
    if entry is None:
        more: dict[str, Any] = {"fingerprint": fingerprint, "n_ctx": description.get("n_ctx")}
        more |= {"state": READY, "problem": ""}
        return replies.model("base", server.started, root=server.base_id, parent=None, more=more)
    contract = entry.about.get("contract") or {}
    more = {
        "fingerprint": contract.get("base_fingerprint", ""),
        "content_hash": entry.about.get("content_hash", ""),
        "scale": entry.scale,
        "generation": entry.generation,
        "system": contract.get("system", ""),
        "sampling": contract.get("sampling", {}),
        "state": entry.state,
        "problem": entry.problem,
    }
    if whole:
        more |= {"training": contract.get("training", {}), "notices": entry.about.get("notices", [])}
    return replies.model(entry.name, server.started, root=entry.path.name, parent="base", more=more)


def _add_models(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        key = server.authenticate(request)
        everything = request.query_params.get("all") in ("true", "1") and (key is None or key.admin)
        names = set(server.visible(key))
        entries = [each for each in server.registry if everything or (each.name in names and each.state == READY)]
        listed = [_model(server, None)] if everything or server.may_base(key) else []
        listed += [_model(server, entry, whole=everything) for entry in entries]
        return JSONResponse({"object": "list", "data": listed})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        key = server.authenticate(request)
        adapter, _ = server.resolve(name, None, key)
        entry = None if adapter is None else server.registry.get(str(adapter))
        return JSONResponse(_model(server, entry))


def _add_completions(app: FastAPI, server: Server) -> None:
    async def answered(request: Request, read: Callable[[Any], bodies.Asked]) -> Response:
        key = server.authenticate(request)
        request.state.key = key.name if key else None
        asked = read(await read_json(request, server.settings.max_body))
        return await answering.answer(server, request, asked, key)

    @app.post("/v1/chat/completions", openapi_extra=document.body(document.CHAT))
    async def chat(request: Request) -> Response:
        return await answered(request, bodies.read_chat)

    @app.post("/v1/completions", openapi_extra=document.body(document.COMPLETION))
    async def completions(request: Request) -> Response:
        return await answered(request, bodies.read_completion)

    @app.post("/v1/embeddings", openapi_extra=document.body(document.EMBEDDINGS))
    async def embeddings(request: Request) -> Response:
        key = server.authenticate(request)
        asked = bodies.read_embeddings(await read_json(request, server.settings.max_body))
        return await answering.embed(server, asked, key)


def _add_adapters(app: FastAPI, server: Server) -> None:
    """Managing adapters, with vLLM's paths and fields (docs.vllm.ai, "LoRA Adapters")."""

    def text(body: Any, name: str) -> str:
        value = body.get(name) if isinstance(body, dict) else None
        if not isinstance(value, str) or not value:
            raise ApiError(400, f"{name} is missing, or no text", param=name)
        return value

    def generation(value: Any) -> int | None:
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        raise ApiError(400, "if_generation has to be a whole number, 0 for a new name", param="if_generation")

    def name_of(given: str) -> str:
        try:
            return check_name(given)
        except SettingsError as error:
            raise ApiError(400, error.message, param="lora_name") from None

    @app.post("/v1/load_lora_adapter", openapi_extra=document.body(document.LOAD))
    async def load(request: Request) -> Response:
        server.authenticate(request, admin=True)
        body = await read_json(request, server.settings.max_body)
        name, path = name_of(text(body, "lora_name")), server.registry.inside(text(body, "lora_path"))
        scale = body.get("scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < 1e6:
            raise ApiError(400, "scale has to be a number", param="scale")
        may_replace = body.get("load_inplace", False) is True or body.get("if_generation") is not None
        if not may_replace and any(entry.name == name for entry in server.registry):
            message = f"The adapter {name!r} is loaded already; say load_inplace or if_generation"
            raise ApiError(400, message, code="already_loaded")
        entry = await server.registry.load(name, path, float(scale), generation(body.get("if_generation")))
        return JSONResponse(_model(server, entry, whole=True))

    @app.post("/v1/unload_lora_adapter", openapi_extra=document.body(document.UNLOAD))
    async def unload(request: Request) -> Response:
        server.authenticate(request, admin=True)
        body = await read_json(request, server.settings.max_body)
        name = text(body, "lora_name")
        await server.registry.unload(name, generation(body.get("if_generation")))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    @app.put("/v1/adapters/{name}", openapi_extra=document.FILE)
    async def upload(request: Request, name: str) -> Response:
        """A GGUF file as the body; `?if_generation=N`."""
        server.authenticate(request, admin=True)
        given = request.query_params.get("if_generation")
        if given is not None and not (given.isascii() and given.isdigit() and len(given) < 19):
            raise ApiError(400, "if_generation has to be a whole number", param="if_generation")
        entry = await answering.upload(server, request, name_of(name), None if given is None else int(given))
        return JSONResponse(_model(server, entry, whole=True), 201)


def _add_health(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """Requests would be answered now."""
        if server.is_ready:
            return JSONResponse({"status": "ready"})
        raise answering.down(server)

    @app.get("/status")
    async def status(request: Request) -> Response:
        key = server.authenticate(request)
        return JSONResponse(server.status(await server.engine_state(), key))

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        server.authenticate(request, admin=server.keys is not None)
        await server.engine_state()
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
