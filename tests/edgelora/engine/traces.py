"""Requests run together on one runtime, step by step, with the logits that each of their tokens was drawn from."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgelora.engine.generation import Generation
from edgelora.engine.runtime import Runtime
from edgelora.engine.stream import Completion, Request, Task

MAX_STEPS = 20_000


@dataclass
class Trace:
    """What became of a request: its pieces, and then how it ended or what went wrong."""

    task: Task
    logits: list[np.ndarray] = field(default_factory=list)
    tokens: list[int | None] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    completion: Completion | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.completion is not None or self.error is not None

    @property
    def text(self) -> str:
        assert self.completion is not None, repr(self.error)
        return self.completion.text

    def read(self) -> Trace:
        """Take what was emitted so far."""
        while not self.task.items.empty():
            item = self.task.items.get_nowait()
            if isinstance(item, str):
                self.pieces.append(item)
            elif isinstance(item, Completion):
                self.completion = item
            else:
                self.error = item
        return self


class Traced:
    """Steps a runtime by hand."""

    def __init__(self, made: Runtime) -> None:
        self.made = made
        self.traces: list[Trace] = []
        draw = made.scheduler._draw

        def noted(each: Generation, row: int) -> None:
            (trace,) = [trace for trace in self.traces if trace.task is each.task] or [Trace(each.task)]
            trace.logits.append(np.ctypeslib.as_array(made.context.logits(row), (made.context.n_vocab,)).copy())
            draw(each, row)
            trace.tokens.append(each.pending)

        made.scheduler._draw = noted  # type: ignore[method-assign]

    def submit(self, request: Request) -> Trace:
        trace = Trace(Task(request))
        self.traces.append(trace)
        self.made.submit(trace.task)
        return trace

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            if not self.made.scheduler.step():
                time.sleep(0.0005)  # an adapter is being read
        for trace in self.traces:
            trace.read()

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(MAX_STEPS):
            if condition():
                return
            self.step()
        raise AssertionError("it never came to that")

    def finish(self) -> None:
        self.until(lambda: self.made.scheduler.is_idle)
        for trace in self.traces:
            trace.read()

    def generation(self, trace: Trace) -> Generation | None:
        return next((each for each in self.made.scheduler._running if each.task is trace.task), None)


def together(made: Runtime, requests: Sequence[Request]) -> list[Trace]:
    """All at once."""
    traced = Traced(made)
    traces = [traced.submit(request) for request in requests]
    traced.finish()
    return traces


def alone(made: Runtime, requests: Sequence[Request]) -> list[Trace]:
    """One after the other, each with a memory that holds nothing."""
    traced, traces = Traced(made), []
    for request in requests:
        for sequence in made.cache.sequences:
            made.cache.drop(sequence)
        traces.append(traced.submit(request))
        traced.finish()
    return traces


def largest_difference(got: Trace, want: Trace) -> float:
    """Of the logits, as long as both wrote the same tokens before."""
    same = sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(got.tokens, want.tokens, strict=False))
    )
    rows = zip(got.logits[: same + 1], want.logits[: same + 1], strict=False)
    return max(float(np.abs(mine - theirs).max()) for mine, theirs in rows)


def assert_same_reply(got: Trace, want: Trace, tolerance: float) -> None:
    """Logits within `tolerance`, and so texts that part, if at all, where two candidates were nearly as good.

    At temperature 0: what is drawn can part anywhere.
    """
    assert largest_difference(got, want) <= tolerance
    if got.text != want.text:
        parted = next(at for at, pair in enumerate(zip(got.tokens, want.tokens, strict=False)) if pair[0] != pair[1])
        best, second = np.sort(want.logits[parted])[-1:-3:-1]
        assert best - second <= 2 * tolerance, f"{got.text!r} is not {want.text!r}"
