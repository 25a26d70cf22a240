"""An engine without a model: it answers with what it was asked, when it is let, and remembers the order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edgelora.engine.engine import Completion, Request

_NO_FIGURES: dict[str, Any] = {each.name: 0 for each in fields(Completion) if each.default is MISSING}


class FakeStream:
    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self._engine, self.request = engine, request
        self.cancelled = threading.Event()

    @property
    def completion(self) -> Completion:
        self._engine.before_end(self)
        text = f"{self.request.adapter}: {self.request.messages[-1]['content']}"  # type: ignore[index]
        with self._engine.lock:
            self._engine.ended.append(text)
            self._engine.n_under_way -= 1
        reason = "cancelled" if self.cancelled.is_set() else "stop"
        said: dict[str, Any] = {
            "text": text,
            "finish_reason": reason,
            "prompt_tokens": 10,
            "completion_tokens": len(text),
        }
        said |= {"seconds_waiting": 60.0}  # all of its time: of its own it took none
        return Completion(**{**_NO_FIGURES, **said, "adapter": str(self.request.adapter), "adapter_hash": ""})

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """Stands in for `Engine` where only the batch is looked at.

    Args:
        before_end: called on the waiting thread before a reply ends; it may wait.

    Attributes:
        begun, ended: texts, in the order in which requests came and replies ended.
        most_under_way: the largest number of requests that were in the engine at once.
    """

    base_fingerprint, base_name, template_source = "f" * 64, "fake", ""
    on_overflow, n_ctx, kv_type = "error", 4096, "f16"

    def __init__(
        self, folder: Path, parallel: int = 4, before_end: Callable[[FakeStream], Any] = lambda _: None
    ) -> None:
        self.base = folder / "fake.gguf"
        self.base.write_bytes(b"fake")
        self.parallel = self.deterministic_rows = parallel
        self.adapters = ["red", "blue"]
        self.before_end = before_end
        self.lock = threading.Lock()
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.n_under_way = self.most_under_way = 0
        self.streams: list[FakeStream] = []

    def adapter(self, name: str) -> Any:
        return SimpleNamespace(content_hash=name, scale=1.0)

    def submit(self, request: Request) -> FakeStream:
        with self.lock:
            self.begun.append(f"{request.adapter}: {request.messages[-1]['content']}")  # type: ignore[index]
            self.n_under_way += 1
            self.most_under_way = max(self.most_under_way, self.n_under_way)
        return FakeStream(self, request)
