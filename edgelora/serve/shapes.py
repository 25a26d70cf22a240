"""Answers in OpenAI's shapes: whole, or as the chunks of a stream."""

from __future__ import annotations

import base64
import json
import struct
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.engine.stream import TokenLogprob
from edgelora.serve.bodies import Asked, AskedEmbeddings

DONE = b"data: [DONE]\n\n"


def sse(event: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


@dataclass(frozen=True)
class Finished:
    """A whole reply, and the engine's account of it."""

    text: str
    logprobs: Sequence[TokenLogprob]
    account: Mapping[str, Any]


class Shape:
    """The answer to one request.

    Args:
        fingerprint: of the base.
    """

    def __init__(self, asked: Asked, fingerprint: str) -> None:
        self._asked = asked
        self._is_chat = asked.kind == "chat"
        self._wants_logprobs = "logprobs" in asked.sampling
        kind, prefix = ("chat.completion", "chatcmpl") if self._is_chat else ("text_completion", "cmpl")
        self._whole_kind, self._chunk_kind = kind, f"{kind}.chunk" if self._is_chat else kind
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": f"fp_{fingerprint[:12]}",
        }
        self._offsets: dict[int, int] = {}

    def whole(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """The answer that is not streamed; one choice for each reply."""
        choices = []
        for index, each in enumerate(finished):
            reason, text = each.account["finish_reason"], each.text
            if self._is_chat:
                calls = _calls(each.account)
                message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text}
                message |= {"refusal": None}
                if calls:
                    message["tool_calls"] = calls
                choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": reason}
                choice["logprobs"] = _chat_logprobs(each.logprobs) if self._wants_logprobs else None
            else:
                text = self._echoed(index) + text
                choice = {"index": index, "text": text, "finish_reason": reason}
                choice["logprobs"] = self._legacy(index, each.logprobs) if self._wants_logprobs else None
            choices.append(choice)
        usage = self._usage([each.account for each in finished])
        return {**self._head, "object": self._whole_kind, "choices": choices, "usage": usage}

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        for index in range(self._asked.n * len(self._asked.prompts)):
            if self._is_chat:
                yield self._chunk(index, {"role": "assistant", "content": ""})
            elif echoed := self._echoed(index):
                yield self._chunk(index, echoed)

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> Iterator[dict[str, Any]]:
        """More of a reply."""
        yield self._chunk(index, {"content": text} if self._is_chat else text, logprobs)

    def closing(self, index: int, account: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The end of a reply: its calls of tools, and why it ended."""
        if self._is_chat and (calls := _calls(account)):
            yield self._chunk(index, {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]})
        yield self._chunk(index, {} if self._is_chat else "", reason=account["finish_reason"])

    def usage(self, accounts: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The last chunk, where it was asked for."""
        if self._asked.include_usage:
            yield {**self._head, "object": self._chunk_kind, "choices": [], "usage": self._usage(accounts)}

    def _chunk(
        self, index: int, delta: Any, logprobs: Sequence[TokenLogprob] = (), reason: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        choice["delta" if self._is_chat else "text"] = delta
        if logprobs and self._wants_logprobs:
            choice["logprobs"] = _chat_logprobs(logprobs) if self._is_chat else self._legacy(index, logprobs)
        chunk = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        return {**chunk, "usage": None} if self._asked.include_usage else chunk

    def _echoed(self, index: int) -> str:
        return str(self._asked.prompts[index // self._asked.n]) if self._asked.echo else ""

    def _usage(self, accounts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tokens of all choices; a prompt counts once, however many replies it has."""
        prompts = accounts[:: self._asked.n]
        prompt = sum(account["prompt_tokens"] for account in prompts)
        written = sum(account["completion_tokens"] for account in accounts)
        cached = sum(account["cached_tokens"] for account in prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _legacy(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log probabilities in the form of /v1/completions."""
        tokens = [_text(each) for each in logprobs]
        offset, offsets = self._offsets.get(index, len(self._echoed(index))), list[int]()
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [{_text(top): top.logprob for top in each.top} for each in logprobs],
            "text_offset": offsets,
        }


def model(name: str, created: int, *, root: str, parent: str | None, more: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of /v1/models, with what only edgelora tells under a name of its own."""
    entry = {"id": name, "object": "model", "created": created, "owned_by": "edgelora", "root": root, "parent": parent}
    return {**entry, "edgelora": dict(more)}


def embeddings(asked: AskedEmbeddings, vectors: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
    """The answer of /v1/embeddings."""

    def encoded(vector: Sequence[float]) -> Any:
        if asked.encoding_format == "float":
            return list(vector)
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

    data = [{"object": "embedding", "index": index, "embedding": encoded(each)} for index, each in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": asked.model, "usage": usage}


def _calls(account: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for call in account["tool_calls"]
    ]


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(token: TokenLogprob) -> dict[str, Any]:
        return {"token": _text(token), "logprob": token.logprob, "bytes": list(token.text)}

    return {"content": [{**entry(each), "top_logprobs": [entry(top) for top in each.top]} for each in logprobs]}


def _text(token: TokenLogprob) -> str:
    return token.text.decode("utf-8", errors="replace")
