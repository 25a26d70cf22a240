"""Replies in OpenAI's shapes: whole, or as the chunks of a stream (https://platform.openai.com/docs/api-reference).

    shape = shape_of(asked, base_fingerprint)
    shape.whole([Finished("Yes.", [], account)])          # {"id": "chatcmpl-...", "object": "chat.completion", ...}

    for chunk in shape.opening():                         # {"object": "chat.completion.chunk", ..., "choices":
        send(sse(chunk))                                  #   [{"index": 0, "delta": {"role": "assistant", ...}, ...}]}
    ...                                                   # piece() for each piece, closing() for each choice, usage()
    send(DONE)

An account is what the engine's process says of a finished reply: `protocol.completion_fields`.
"""

from __future__ import annotations

import base64
import codecs
import json
import struct
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from edgelora.engine.stream import TokenLogprob
from edgelora.serve.bodies import Asked, AskedEmbeddings
from edgelora.serve.problems import ApiError
from edgelora.tools import new_call_id

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON does not have; OpenAI's own number for what is out of the question."""
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def sse(event: Mapping[str, Any]) -> bytes:
    """A server-sent event. Some clients end lines at more characters than the format does: those are escaped too."""
    text = json.dumps(event, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_LINE_ENDS)
    # Half a character cannot be UTF-8; with a backslash it is JSON's own way to write it.
    return b"data: " + text.encode("utf-8", "backslashreplace") + b"\n\n"


@dataclass(frozen=True)
class Finished:
    """A whole reply, and the engine's account of it."""

    text: str
    logprobs: Sequence[TokenLogprob]
    account: Mapping[str, Any]


def finish_reason(account: Mapping[str, Any]) -> str:
    """Why a reply ended: stop, length or tool_calls.

    Raises:
        ApiError: 408, its time was over.
    """
    reason = str(account["finish_reason"])
    if reason == "deadline":
        raise ApiError(408, "The reply took longer than it may", type="timeout", code="timeout")
    if reason not in ("stop", "length", "tool_calls"):
        raise ValueError(f"a reply that ended with {reason!r} is nobody's to read")
    return reason


def usage_of(accounts: Sequence[Mapping[str, Any]], n: int) -> dict[str, Any]:
    """The tokens of all choices; of each prompt once, however many (`n`) replies it has."""
    prompts = accounts[::n]
    read, cached, dropped = (
        sum(account[name] for account in prompts) for name in ("prompt_tokens", "cached_tokens", "dropped_tokens")
    )
    written = sum(account["completion_tokens"] for account in accounts)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        **({"dropped_tokens": dropped} if dropped else {}),  # a conversation that was cut is never cut silently
    }


class Shape(ABC):
    """The answer to one request; all its chunks have one id.

    Args:
        fingerprint: of the base, of which `system_fingerprint` is the beginning.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, asked: Asked, fingerprint: str) -> None:
        self._asked = asked
        self._wants_logprobs = "logprobs" in asked.sampling
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": f"fp_{fingerprint[:12]}",
        }

    def whole(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """The answer that is not streamed; a choice for each reply.

        Raises:
            ApiError: 408, a reply's time was over.
        """
        choices = [
            {
                "index": index,
                **self._whole(index, each),
                "logprobs": self._logprobs(index, each.logprobs) if self._has_logprobs(each) else None,
                "finish_reason": finish_reason(each.account),
            }
            for index, each in enumerate(finished)
        ]
        usage = usage_of([each.account for each in finished], self._asked.n)
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    @abstractmethod
    def opening(self) -> Iterator[dict[str, Any]]:
        """The chunks that a stream begins with."""

    @abstractmethod
    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Iterator[dict[str, Any]]:
        """The chunks for more of choice `index`."""

    @abstractmethod
    def closing(self, index: int, account: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks that choice `index` ends with.

        Raises:
            ApiError: 408, its time was over.
        """

    def usage(self, accounts: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The last chunk, where it was asked for: figures, and no choices."""
        if self._asked.include_usage:
            usage = usage_of(accounts, self._asked.n)
            yield {**self._head, "object": self.chunk_kind, "choices": [], "usage": usage}

    @abstractmethod
    def _whole(self, index: int, reply: Finished) -> dict[str, Any]:
        """What a choice says of its text."""

    @abstractmethod
    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]: ...

    def _chunk(
        self,
        index: int,
        said: Mapping[str, Any],
        tokens: Sequence[TokenLogprob] = (),
        reason: str | None = None,
    ) -> dict[str, Any]:
        logprobs = self._logprobs(index, tokens) if tokens and self._wants_logprobs else None
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self._asked.include_usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": [choice], **usage}

    def _has_logprobs(self, reply: Finished) -> bool:
        """Whether a choice tells log probabilities: OpenAI's are those of the content, and a call is none."""
        return self._wants_logprobs and bool(reply.logprobs or not reply.account.get("tool_calls"))

    @property
    def _indices(self) -> range:
        return range(self._asked.n * len(self._asked.prompts))


class ChatShape(Shape):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in self._indices:
            yield self._chunk(index, {"delta": {"role": "assistant", "content": "", "refusal": None}})

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Iterator[dict[str, Any]]:
        yield self._chunk(index, {"delta": {"content": text}}, logprobs)

    def closing(self, index: int, account: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        reason = finish_reason(account)
        if calls := _calls(account):
            delta = {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]}
            yield self._chunk(index, {"delta": delta})
        yield self._chunk(index, {"delta": {}}, reason=reason)

    def _whole(self, index: int, reply: Finished) -> dict[str, Any]:
        calls = _calls(reply.account)
        content = None if calls and not reply.text else reply.text
        return {
            "message": {
                "role": "assistant",
                "content": content,
                "refusal": None,
                **({"tool_calls": calls} if calls else {}),
            }
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """A token may end inside a character: its `bytes` are exact, its `token` is not."""

        def entry(token: TokenLogprob) -> dict[str, Any]:
            text = token.text.decode("utf-8", "replace")
            return {"token": text, "logprob": _finite(token.logprob), "bytes": list(token.text)}

        listed = [{**entry(token), "top_logprobs": [entry(each) for each in token.top]} for token in tokens]
        return {"content": listed, "refusal": None}


@dataclass
class _Place:
    """Where the next token of a text begins, in characters; one that begins inside a character counts from there."""

    offset: int
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"), repr=False
    )

    def after(self, token: bytes) -> int:
        """The place of `token`, which is stepped over."""
        before = self.offset
        self.offset += len(self.decoder.decode(token))
        return before


class TextShape(Shape):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: Asked, fingerprint: str) -> None:
        super().__init__(asked, fingerprint)
        self._places = [_Place(len(self._echoed(index))) for index in self._indices]

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in self._indices:
            if echoed := self._echoed(index):
                yield self._chunk(index, {"text": echoed})

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Iterator[dict[str, Any]]:
        yield self._chunk(index, {"text": text}, logprobs)

    def closing(self, index: int, account: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        yield self._chunk(index, {"text": ""}, reason=finish_reason(account))

    def _whole(self, index: int, reply: Finished) -> dict[str, Any]:
        return {"text": self._echoed(index) + reply.text}

    def _echoed(self, index: int) -> str:
        return str(self._asked.prompts[index // self._asked.n]) if self._asked.echo else ""

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Four lists, a place in each for every token. As OpenAI documents, a token is among its own candidates."""
        return {
            "tokens": [_named(token) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{_named(each): _finite(each.logprob) for each in (*token.top, token)} for token in tokens],
            "text_offset": [self._places[index].after(token.text) for token in tokens],
        }


def shape_of(asked: Asked, fingerprint: str) -> Shape:
    """The shape that the answer to a body has."""
    return (ChatShape if asked.kind == "chat" else TextShape)(asked, fingerprint)


def model(name: str, created: int, *, root: str, parent: str | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of /v1/models; `root` and `parent` are vLLM's, `more` is what only edgelora tells.

    Args:
        created: in seconds since 1970.
    """
    entry = {"id": name, "object": "model", "created": created, "owned_by": "edgelora", "root": root, "parent": parent}
    return {**entry, "edgelora": dict(more)}


def models(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer of /v1/models."""
    return {"object": "list", "data": list(entries)}


def embeddings(asked: AskedEmbeddings, vectors: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
    """The answer of /v1/embeddings.

    Args:
        vectors: one for each input, of as many floats as the base is wide.
        tokens: of all inputs.
    """

    def encoded(vector: Sequence[float]) -> list[float] | str:
        if asked.encoding_format == "float":
            return [float(value) for value in vector]
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

    data = [{"object": "embedding", "index": index, "embedding": encoded(each)} for index, each in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}


def _calls(account: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": new_call_id(),
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for call in account.get("tool_calls", ())
    ]


def _named(token: TokenLogprob) -> str:
    """A token's text; of one that ends inside a character the bytes, as OpenAI writes them: `bytes:\\xe2\\x82`."""
    try:
        return token.text.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.text)


def _finite(logprob: float) -> float:
    return max(LEAST_LOGPROB, logprob)
