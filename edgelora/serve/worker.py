"""The process that owns the engine: `python -m edgelora.serve.worker SOCKET`, started by `process`.

It reads what to do from the socket, a line each, and writes what comes of it. Where the socket ends, so does it: a
server that was killed leaves nothing running. Signals of the terminal are the server's to handle.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.engine import Engine
from edgelora.engine.stream import Completion, Item, Piece, Stream
from edgelora.errors import SettingsError
from edgelora.serve import protocol

Arguments = dict[str, Any]
END_SECONDS = 60.0
"""In which the engine has to end once the server is gone; it may have KV to save."""


class Worker:
    """One engine and its socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._outgoing: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._streams: dict[int, Stream] = {}
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="edgelora-slow")  # what reads files
        self._engine: Engine | None = None
        self._base = ""
        self._does: dict[str, Callable[[Arguments], Any]] = {
            "load": self._load,
            "unload": self._unload,
            "check": self._check,
            "embed": self._embed,
            "state": lambda _: self._state(),
            "count_tokens": lambda given: self.engine.count_tokens(given["messages"], given["adapter"]),
        }

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def run(self) -> None:
        """Until the socket ends."""
        writer = threading.Thread(target=self._write, name="edgelora-writer", daemon=True)
        writer.start()
        with self._connection.makefile("rb") as file:
            lines = protocol.whole_lines(file)
            if first := next(lines, b""):
                self._slow.submit(self._open, protocol.parsed(first))
            for data in lines:
                self._handle(protocol.parsed(data))
        leaving = threading.Timer(END_SECONDS, os._exit, (1,))  # where the engine hangs, nobody else may end this
        leaving.daemon = True
        leaving.start()
        self._slow.shutdown(cancel_futures=True)
        self._streams.clear()
        if self._engine:
            self._engine.close()
        self._outgoing.put(None)
        writer.join(5)

    def _open(self, options: Arguments) -> None:
        """Load the base. Not on the thread that reads: who asks meanwhile whether this process lives is answered."""
        self._base = options["base"]
        try:
            self._engine = Engine(Path(options.pop("base")), **options)
        except Exception as error:
            self._say({"event": "failed", "error": protocol.error_fields(error)})
        else:
            self._say({"event": "ready", "result": self._state()})

    def _handle(self, message: dict[str, Any]) -> None:
        number, do = message.get("id", 0), message["do"]
        if do == "ping":
            self._say({"event": "alive", "turn": self._engine.turn if self._engine else 0})
        elif do == "generate":
            self._generate(number, message["arguments"])
        elif do == "cancel":
            if stream := self._streams.get(number):
                stream.cancel()
        else:
            self._slow.submit(self._answer, number, do, message["arguments"])

    def _generate(self, number: int, arguments: Arguments) -> None:
        is_over = False

        def deliver(item: Item) -> None:
            nonlocal is_over
            if isinstance(item, str):
                logprobs = item.logprobs if isinstance(item, Piece) else ()
                more = {"logprobs": [protocol.logprob_fields(each) for each in logprobs]} if logprobs else {}
                self._say({"id": number, "piece": str(item), **more})
                return
            is_over = True
            self._streams.pop(number, None)
            if isinstance(item, Completion):
                self._say({"id": number, "result": protocol.completion_fields(item)})
            else:
                self._fail(number, item)

        try:
            request = protocol.request_of(arguments)
            self._streams[number] = self.engine.submit(request, deliver)
            if is_over:  # before it was noted
                self._streams.pop(number, None)
        except Exception as error:
            self._fail(number, error)

    def _answer(self, number: int, do: str, arguments: Arguments) -> None:
        try:
            result = self._does[do](arguments)
        except Exception as error:
            self._fail(number, error)
        else:
            self._say({"id": number, "result": result})

    def _load(self, given: Arguments) -> dict[str, Any]:
        self._say({"event": "loading", "name": given["name"]})
        try:
            ref = AdapterRef(given["name"], Path(given["path"]), given["scale"])
            adapter = self.engine.load_adapter(ref.name, ref.path, ref.scale, tried=given["tried"])
        finally:
            self._say({"event": "loaded", "name": given["name"]})
        contract = adapter.contract
        return {
            "content_hash": adapter.content_hash,
            "scale": adapter.scale,
            "notices": [self._without_paths(each).replace(given["path"], ref.path.name) for each in adapter.notices],
            "contract": None
            if contract is None
            else {
                "base_name": contract.base_name,
                "base_fingerprint": contract.base_fingerprint,
                "system": contract.system,
                "sampling": dict(contract.sampling),
                "training": contract.training,
            },
        }

    def _embed(self, given: Arguments) -> dict[str, Any]:
        vectors, tokens = self.engine.embed(given["inputs"], given["adapter"])
        return {"vectors": vectors, "tokens": tokens}

    def _check(self, given: Arguments) -> None:
        self.engine.check_adapter(given["path"])

    def _unload(self, given: Arguments) -> None:
        self.engine.unload_adapter(given["name"])

    def _state(self) -> dict[str, Any]:
        return {**self.engine.state(), "pid": os.getpid()}

    def _fail(self, number: int, error: BaseException) -> None:
        fields = protocol.error_fields(error)
        self._say({"id": number, "error": {**fields, "message": self._without_paths(fields["message"])}})

    def _without_paths(self, text: str) -> str:
        """Clients hear of it: they know the base by its name, and not where it lies."""
        return text.replace(self._base, Path(self._base).name)

    def _say(self, message: dict[str, Any]) -> None:
        self._outgoing.put(message)

    def _write(self) -> None:
        while (message := self._outgoing.get()) is not None:
            try:
                self._connection.sendall(protocol.line(message))
            except SettingsError as error:
                self._fail(message["id"], error)
            except OSError:  # the server is gone; the reader notices
                return


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    Worker(connection).run()


if __name__ == "__main__":
    main()
