"""A runtime with adapters, and the logits that it computes: what comparisons of its memory with a fresh one need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.runtime import Runtime, Settings
from edgelora.engine.stream import Completion, Request, Task


@contextmanager
def runtime(settings: Settings, adapters: dict[str, Path]) -> Iterator[Runtime]:
    made = Runtime(settings, lambda: True)
    try:
        for name, path in adapters.items():
            made.load_adapter(AdapterRef(name, path))
        yield made
    finally:
        made.close()


def answer(made: Runtime, request: Request) -> Completion:
    """Steps until a request is done.

    Raises:
        EdgeloraError: it cannot be answered.
    """
    task = Task(request)
    made.submit(task)
    for _ in range(10_000):
        if made.scheduler.is_idle:
            break
        made.scheduler.step()
    while not isinstance(item := task.items.get_nowait(), Completion):
        if isinstance(item, BaseException):
            raise item
    return item


def prompt_logits(made: Runtime, request: Request) -> tuple[np.ndarray, Completion]:
    """Logits of the prompt's last token (n_vocab,): one generated token needs no further decode."""
    completion = answer(made, request)
    return np.ctypeslib.as_array(made.context.logits(), (made.context.n_vocab,)).copy(), completion
