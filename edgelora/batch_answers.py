"""Many requests in the engine at once, and their replies as they come.

Rows are read a block at a time, and those of a block begin in an order in which neighbours share what the engine can
reuse: the adapter and the messages before the last one (a system prompt is read once), then a like length. Replies come
in the order in which they are done, or in the input's: then no more finished ones than a block has wait for an earlier
one, nothing new begins until it is there, and blocks are smaller, since a kill loses what waits.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from edgelora.batch_rows import ROW_ERRORS, Item
from edgelora.engine.engine import BATCH_WINDOW, Completion, Engine, Request, Stream
from edgelora.errors import EdgeloraError, SettingsError

READ_AHEAD = 256
"""Rows of a block; in the order of the input, a block is twice what is in the engine."""


@dataclass(frozen=True)
class Answer:
    """What became of a row.

    Attributes:
        reply: the completion, or an error that is the row's own.
        seconds: from its place in the engine to its end, without the time it waited for one.
    """

    item: Item
    reply: Completion | EdgeloraError
    seconds: float = 0.0


@dataclass(frozen=True)
class _Ready:
    """A request that is made, or the error that made it impossible."""

    item: Item
    request: Request | EdgeloraError

    @property
    def likeness(self) -> tuple[str, str, int]:
        """Neighbours in this order have most in common."""
        if isinstance(self.request, EdgeloraError):
            return "", "", 0
        before, last = list(self.request.messages[:-1]), self.request.messages[-1]
        return str(self.request.adapter), json.dumps(before), -len(str(last))


class Answers:
    """The answers to `items`, each given with what is wrong with it, or the empty text.

    Args:
        request: makes a row's request, or raises one of `ROW_ERRORS`.
        ordered: answers come in the order of the items.
    """

    def __init__(
        self,
        engine: Engine,
        items: Iterator[tuple[Item, str]],
        request: Callable[[Item], Request],
        *,
        ordered: bool = False,
    ) -> None:
        self._engine, self._items, self._request, self._ordered = engine, items, request, ordered
        self._limit = max(BATCH_WINDOW, 2 * engine.parallel)
        self._block = 2 * self._limit if ordered else READ_AHEAD
        self._done: SimpleQueue[Answer | BaseException] = SimpleQueue()
        self._streams: set[Stream] = set()
        self._waiting: deque[_Ready] = deque()
        self._order: deque[int] = deque()  # places in the input whose answers are still to come
        self._held: dict[int, Answer] = {}
        self._n_begun = 0

    def each(self) -> Generator[Answer]:
        """The answers. To be closed: what is under way is then cancelled.

        Raises:
            EdgeloraError: the engine cannot go on.
        """
        with ThreadPoolExecutor(self._limit, thread_name_prefix="edgelora-batch") as threads:
            try:
                while self._begin(threads):
                    answer = self._done.get()
                    if isinstance(answer, BaseException):
                        raise answer
                    self._n_begun -= 1
                    yield from self._in_order(answer)
            finally:
                for stream in list(self._streams):
                    stream.cancel()

    def _begin(self, threads: ThreadPoolExecutor) -> bool:
        """Begin as many requests as there is room for. False: there is nothing to wait for any more."""
        while self._n_begun < self._limit and len(self._held) < self._block and (self._waiting or self._read()):
            ready = self._waiting.popleft()
            self._n_begun += 1
            if isinstance(ready.request, EdgeloraError):
                self._done.put(Answer(ready.item, ready.request))
                continue
            started, stream = time.perf_counter(), self._engine.submit(ready.request)
            self._streams.add(stream)
            threads.submit(self._wait, ready.item, stream, started)
        return self._n_begun > 0

    def _read(self) -> bool:
        block = [self._ready(item, problem) for item, problem in itertools.islice(self._items, self._block)]
        if self._ordered:
            self._order.extend(ready.item.place for ready in block)
        self._waiting.extend(sorted(block, key=lambda ready: ready.likeness))
        return bool(block)

    def _ready(self, item: Item, problem: str) -> _Ready:
        if problem:
            return _Ready(item, SettingsError(problem))
        try:
            return _Ready(item, self._request(item))
        except ROW_ERRORS as error:
            return _Ready(item, error)

    def _wait(self, item: Item, stream: Stream, started: float) -> None:
        """On a thread of its own: streams can only be waited for one by one."""
        answer: Any
        try:
            completion = stream.completion
            seconds = time.perf_counter() - started - completion.seconds_waiting
            answer = Answer(item, completion, max(0.0, seconds))
        except ROW_ERRORS as error:
            answer = Answer(item, error)
        except BaseException as error:
            answer = error
        with suppress(KeyError):
            self._streams.remove(stream)
        self._done.put(answer)

    def _in_order(self, answer: Answer) -> Iterator[Answer]:
        if not self._ordered:
            yield answer
            return
        self._held[answer.item.place] = answer
        while self._order and self._order[0] in self._held:
            yield self._held.pop(self._order.popleft())
