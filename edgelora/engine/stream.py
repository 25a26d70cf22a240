"""What callers hold: what they ask for, the text as it comes, and the account of it at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from edgelora.engine.native import InterruptFlag
from edgelora.messages import Message
from edgelora.sampling import Sampling
from edgelora.tools.calls import ToolCall


@dataclass(frozen=True)
class Request:
    """One reply to be written.

    Attributes:
        messages: the conversation so far, or one user message as a string. Without a system message the adapter's own
            system prompt leads; an empty one stands for none at all. With `raw`, a text, or token ids.
        adapter: a loaded adapter's name; None, "none" and "base" are the bare base. A mapping of names to scales blends
            several; template, stops and settings are then the first one's.
        scale: how strongly to apply it; None is the scale it was loaded with. Of a blend, it multiplies every scale.
        sampling: a whole `Sampling`, or the settings that differ from the adapter's own defaults.
        deterministic: with a seed (or temperature 0), the same text to the last token whatever ran before or runs
            beside it: KV is reused only where it is what a fresh engine would compute (see `engine.cache`), and tokens
            are decoded alone, unless the engine is `reproducible`. Otherwise the same seed gives the same text but for
            rounding: kernels add up in another order where a batch has other rows, by some 0.1 of a logit on a 4-bit
            base, so two nearly equal candidates can change places.
        priority: lower ones begin first; what is under way goes on.
        deadline: seconds from now until the reply ends with what there is (finish_reason "deadline").
        raw: continue a text as it is: no template, no system prompt; control tokens written in it are control tokens.
        tools: functions that the model may call, as OpenAI's API defines them; the chat template has to support them.
            `tool_choice` is "auto" (as None), "none", "required", or {"type": "function", "function": {"name": NAME}}.
            The arguments of a tool that is `strict`, and of calls that have to be made, fit its schema; those of others
            are what the model wrote. Beside a schema for the reply, it is calls or JSON that fits.
        tenant: whose request it is. KV of one tenant is never used for another, but for the tokens that the operator
            wrote: the template's and the adapter's own system prompt.
    """

    messages: Sequence[Message] | Sequence[int] | str
    adapter: str | Mapping[str, float] | None = None
    scale: float | None = None
    sampling: Sampling | Mapping[str, Any] | None = None
    deterministic: bool = False
    priority: int = 0
    deadline: float | None = None
    tenant: str | None = None
    raw: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a reply, and how likely the model took it to be: before any sampler, grammar or bias.

    Attributes:
        token: its id.
        text: its bytes, which may end inside a character; joined, those of a reply are its text before stop strings.
        logprob: natural logarithm of its probability.
        top: the likeliest candidates for its place, the best first, as many as were asked for.
    """

    token: int
    text: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class Piece(str):
    """A piece of a reply.

    Attributes:
        logprobs: of the tokens since the piece before, where they were asked for; those of a call between are left out.
    """

    __slots__ = ("logprobs",)

    def __new__(cls, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> Self:
        made = super().__new__(cls, text)
        made.logprobs = logprobs
        return made

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Completion:
    """A finished reply.

    Attributes:
        finish_reason: "stop" (the model ended it, or a stop string), "tool_calls" (it called tools), "length"
            (max_tokens, or the context is full), "cancelled" or "deadline".
        prompt_tokens: tokens of the conversation as rendered; `cached_tokens` of them were in the KV cache already.
        dropped_tokens: tokens of the conversation that were left out, so that it fits ("truncate-middle").
        completion_tokens: tokens generated, without the one that ended the reply.
        adapter: its name, "none" for the bare base, names joined by "+" for a blend; `adapter_hash` is the SHA-256 of
            its file, empty for the base, joined likewise.
        seconds_waiting: from the request until it got a place in the batch.
        seconds_to_first_token: from the request to the first token, waiting for other requests included.
        tokens_per_second: of decode, from the first token to the last; 0 where there were fewer than two.
        tool_calls: of the request's tools, in the order of the reply; they are no part of `text`.
        logprobs: one for each generated token; None where `Sampling.logprobs` did not ask for them.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    dropped_tokens: int
    completion_tokens: int
    adapter: str
    adapter_hash: str
    seconds_waiting: float
    seconds_to_first_token: float
    tokens_per_second: float
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()


Item = Piece | Completion | BaseException
"""What comes of a request: pieces of text, then a `Completion` or an exception."""


class Task:
    """A request on its way through the engine's thread.

    Args:
        deliver: called there with every item, instead of keeping them for a `Stream`; it must not wait.
    """

    def __init__(self, request: Request, deliver: Callable[[Item], None] | None = None) -> None:
        self.request = request
        self.interrupt = InterruptFlag()
        self.submitted = time.perf_counter()
        self.items: SimpleQueue[Item] = SimpleQueue()
        self.put = deliver or self.items.put

    @property
    def is_late(self) -> bool:
        deadline = self.request.deadline
        return deadline is not None and time.perf_counter() - self.submitted > deadline


class Stream(Iterator[str]):
    """The pieces of one reply, as they are written; no piece ends inside a character.

    Ctrl-C while waiting cancels the reply before `KeyboardInterrupt` goes on its way; so does dropping the stream. The
    engine stays usable.
    """

    def __init__(self, task: Task, owner: object) -> None:
        self._task, self._owner = task, owner  # the owner lives at least as long as its streams
        self._completion: Completion | None = None
        self._ended = False

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        try:
            item = self._task.items.get()
        except BaseException:
            self.cancel()
            raise
        if isinstance(item, str):
            return item
        self._ended = True
        if isinstance(item, BaseException):
            raise item
        self._completion = item
        raise StopIteration

    @property
    def completion(self) -> Completion:
        """The account of the reply; waits for its end.

        Raises:
            EdgeloraError: what went wrong, once, here or while iterating.
        """
        for _ in self:
            pass
        if self._completion is None:
            raise RuntimeError("this reply failed, so it has no completion")
        return self._completion

    def cancel(self) -> None:
        """Stop writing; what was written stays, and the reply ends with finish_reason "cancelled"."""
        self._task.interrupt.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self._task.interrupt.set()
