"""A Hugging Face hub of our own on the loopback interface: the endpoints that downloading a model uses.

    GET       /api/models/{id}[/revision/{revision}]           what there is; sizes and digests with ?blobs=true
    GET       /api/models/{id}/tree/{revision}                 the same, as a tree
    HEAD, GET /{id}/resolve/{revision}/{file}                  a file; a large one is sent on to another host
    GET       /cdn/{digest}                                    large contents, in ranges, without asking who it is

It remembers every request, and can be told to fail, to cut a connection in the middle of a file, and to stand still.
Answers as described in https://huggingface.co/docs/hub/api, and as huggingface_hub's `hf_raise_for_status` reads them.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf")
STANDSTILL_SECONDS = 30.0


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Repository:
    """Attributes:
    revisions: files by branch or tag.
    gated: answers 403 unless the token is there; `private` hides it as the hub does.
    claimed_bytes: sizes to lie about in the listing.
    """

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False
    private: bool = False
    token: str = "hf_of_the_owner"
    claimed_bytes: dict[str, int] = field(default_factory=dict)

    def at(self, revision: str) -> dict[str, bytes] | None:
        by_commit = {commit_of(files): files for files in self.revisions.values()}
        short = [commit for commit in by_commit if len(revision) >= 7 and commit.startswith(revision)]
        return self.revisions.get(revision) or (by_commit[short[0]] if short else None)


@dataclass
class Hub:
    """The server's state, shared with the test.

    Attributes:
        cuts: for a file, after how many bytes of each of the next answers the connection breaks.
        still: for a file, after how many bytes the next answer stands still until the connection goes.
        failures: for a part of a path, the status that the next answers have, and how many of them.
        corrupted: files of which something else is sent.
        without_ranges: whole files are sent, whatever range was asked for.
    """

    port: int = 0
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    still: dict[str, int] = field(default_factory=dict)
    failures: dict[str, tuple[int, int]] = field(default_factory=dict)
    corrupted: set[str] = field(default_factory=set)
    without_ranges: bool = False
    reset: bool = False
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self, method: str, part: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]

    def clear(self) -> None:
        for state in (self.requests, self.cuts, self.still, self.failures, self.corrupted):
            state.clear()
        self.without_ranges = self.reset = False


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.closing.set()
            server.shutdown()
            thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each time, otherwise
    state: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.state.requests.append(Request(self.command, self.path, self.headers.get("Range"), token))
        for part, (status, left) in list(self.state.failures.items()):
            if part in self.path and left:
                self.state.failures[part] = (status, left - 1)
                return self._send(status, b'{"error": "the hub is being mended"}')
        path = unquote(urlsplit(self.path).path)
        for pattern, handle in _ROUTES:
            if match := re.fullmatch(pattern, path):
                return handle(self, *match.groups())
        return self._refuse(404, "EntryNotFound", "Not Found")

    def _find(self, name: str, revision: str, *, contents: bool) -> tuple[Repository, dict[str, bytes]] | None:
        repository = self.state.repositories.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and not token.startswith("hf_"):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and token != repository.token):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif contents and repository.gated and token != repository.token:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        elif (files := repository.at(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository, files
        return None

    def _model(self, name: str, revision: str | None) -> None:
        if found := self._find(name, revision or "main", contents=False):
            repository, files = found
            detailed = "blobs" in parse_qs(urlsplit(self.path).query)
            siblings = [
                {"rfilename": path, **(_listed(content, path, repository) if detailed else {})}
                for path, content in files.items()
            ]
            self._send_json({"id": name, "modelId": name, "sha": commit_of(files), "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        if found := self._find(name, revision, contents=False):
            self._send_json([_in_tree(content, path, found[0]) for path, content in found[1].items()])

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision, contents=True)
        if found is None:
            return
        if path not in found[1]:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        content, commit = found[1][path], commit_of(found[1])
        if not path.endswith(LARGE):
            return self._send_content(path, content, {"X-Repo-Commit": commit, "ETag": f'"{git_digest(content)}"'})
        digest = hashlib.sha256(content).hexdigest()
        return self._send(
            302,
            b"",
            {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"http://localhost:{self.state.port}/cdn/{digest}/{path}",  # another origin: no token goes
            },
        )

    def _cdn(self, digest: str, path: str) -> None:
        contents = (
            content
            for repository in self.state.repositories.values()
            for files in repository.revisions.values()
            for content in files.values()
        )
        self._send_content(path, next(c for c in contents if hashlib.sha256(c).hexdigest() == digest), {})

    def _send_content(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        if path in self.state.corrupted:
            content = bytes(255 - byte for byte in content)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked is None or self.state.without_ranges:
            return self._send(200, content, {**headers, "Accept-Ranges": "bytes"}, path)
        start = int(asked[1])
        if start >= len(content):
            return self._send(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
        where = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206, content[start:], {**headers, "Content-Range": where}, path)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, path: str = "") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cuts := self.state.cuts.get(path):
            self._write(body[: cuts.pop(0)])
            self._break()
        elif path in self.state.still:
            self._write(body[: self.state.still.pop(path)])
            self.state.closing.wait(STANDSTILL_SECONDS)
            self.close_connection = True
        else:
            self._write(body)

    def _write(self, body: bytes) -> None:
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:  # the other side has gone, which is what a test may want
            self.close_connection = True

    def _break(self) -> None:
        """End the connection in the middle: as a server that stops, or as a network that resets it."""
        if self.state.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


_ID = r"((?:[^/]+/)?[^/]+)"
_ROUTES: tuple[tuple[str, Any], ...] = (
    (rf"/api/models/{_ID}/tree/(.+)", _Handler._tree),
    (rf"/api/models/{_ID}(?:/revision/(.+))?", _Handler._model),
    (r"/cdn/([0-9a-f]{64})/(.+)", _Handler._cdn),
    (rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler._resolve),
)


def _listed(content: bytes, path: str, repository: Repository) -> dict[str, Any]:
    size = repository.claimed_bytes.get(path, len(content))
    large = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
    return {"blobId": git_digest(content), "size": size, **({"lfs": large} if path.endswith(LARGE) else {})}


def _in_tree(content: bytes, path: str, repository: Repository) -> dict[str, Any]:
    details = _listed(content, path, repository)
    entry = {"type": "file", "path": path, "oid": details["blobId"], "size": details["size"]}
    if lfs := details.get("lfs"):
        entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
        entry["xetHash"] = lfs["sha256"]  # what is large is stored in Xet now; nothing here speaks that protocol
    return entry
