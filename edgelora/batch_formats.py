"""The two shapes of a batch's rows, in and out. The first row that can be read says which one an input has.

Plain rows, with edgelora's own fields:

    {"id": 7, "prompt": "Is it waterproof?", "adapter": "support", "max_tokens": 40}
    {"id": 7, "text": "Yes, IP67.", "finish_reason": "stop", "usage": {"prompt_tokens": 21, "completion_tokens": 6},
     "adapter": "support", "adapter_hash": "9f3a...", "key": "5d41402abc4b2a76.b9719d911017c592.8"}

OpenAI's batch files (https://platform.openai.com/docs/guides/batch), where `model` names the adapter, or the base:

    {"custom_id": "q7", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "support", "messages": [{"role": "user", "content": "Is it waterproof?"}]}}
    {"id": "batch_req_5d41402abc4b2a76.b9719d911017c592.8", "custom_id": "q7",
     "response": {"status_code": 200, "request_id": ..., "body": {"model": "support", "choices": [...], ...}},
     "error": null}

Their `id` is any text of ours, so it carries the key; `created` is 0, since no result depends on a clock. A row that
could not be answered has both a status code of 400 or 404 and an `error`, whichever the reader looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgelora.engine.engine import Completion
from edgelora.engine.stream import TokenLogprob
from edgelora.errors import ContextOverflowError, EdgeloraError, ModelFileError, SettingsError
from edgelora.openai_body import plain_fields
from edgelora.rows import Row

OPENAI_FIELDS = ("custom_id", "method", "url", "body")
OPENAI_URL = "/v1/chat/completions"
ID_PREFIX = "batch_req_"


@dataclass(frozen=True)
class Named:
    """How the output calls a row.

    Attributes:
        labels: its id; where it has none, or one that was used before, its line.
        metadata: what is copied.
    """

    labels: Mapping[str, Any]
    adapter: str
    key: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a row of the output says of itself."""

    labels: Mapping[str, Any]
    key: str
    is_error: bool
    adapter: str


class Format(Protocol):
    """One shape of rows."""

    def id_of(self, data: Mapping[str, Any]) -> Any: ...
    def adapter_of(self, data: Mapping[str, Any]) -> Any: ...

    def fields(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row as a plain one.

        Raises:
            SettingsError: fields that have no meaning here.
        """
        ...

    def reply(self, named: Named, completion: Completion) -> dict[str, Any]: ...
    def error(self, named: Named, error: EdgeloraError) -> dict[str, Any]: ...


class Plain:
    def id_of(self, data: Mapping[str, Any]) -> Any:
        return data.get("id")

    def adapter_of(self, data: Mapping[str, Any]) -> Any:
        return data.get("adapter")

    def fields(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        return data

    def reply(self, named: Named, completion: Completion) -> dict[str, Any]:
        body = {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "usage": _usage(completion),
            "adapter_hash": completion.adapter_hash or None,
        }
        logprobs = {"logprobs": _logprobs(completion.logprobs)} if completion.logprobs is not None else {}
        return self._row(named, {**body, **logprobs})

    def error(self, named: Named, error: EdgeloraError) -> dict[str, Any]:
        return self._row(named, {"error": error.message})

    def _row(self, named: Named, body: Mapping[str, Any]) -> dict[str, Any]:
        return {**named.labels, **body, "adapter": named.adapter, **named.metadata, "key": named.key}


class OpenAIBatch:
    def id_of(self, data: Mapping[str, Any]) -> Any:
        return data.get("custom_id")

    def adapter_of(self, data: Mapping[str, Any]) -> Any:
        body = data.get("body")
        return body.get("model") if isinstance(body, Mapping) else None

    def fields(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        body = data.get("body")
        checks = (
            (set(data) <= set(OPENAI_FIELDS), f"fields beside {', '.join(OPENAI_FIELDS)}: {_list(data)}"),
            (isinstance(data.get("custom_id"), str), f"custom_id is {data.get('custom_id')!r}, expected text"),
            (data.get("method", "POST") == "POST", f"method is {data.get('method')!r}, expected 'POST'"),
            (data.get("url", OPENAI_URL) == OPENAI_URL, f"url is {data.get('url')!r}, expected {OPENAI_URL!r}"),
            (isinstance(body, Mapping), "body is no object"),
        )
        if problems := [problem for ok, problem in checks if not ok]:
            raise SettingsError("; ".join(problems))
        assert isinstance(body, Mapping)
        return plain_fields(body)

    def reply(self, named: Named, completion: Completion) -> dict[str, Any]:
        usage = _usage(completion)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": None if completion.logprobs is None else {"content": _logprobs(completion.logprobs)},
            "finish_reason": completion.finish_reason,
        }
        body = {
            "id": f"chatcmpl-{named.key}",
            "object": "chat.completion",
            "created": 0,
            "model": named.adapter,
            "choices": [choice],
            "usage": {**usage, "total_tokens": completion.prompt_tokens + completion.completion_tokens},
            "system_fingerprint": f"fp_{completion.adapter_hash[:16] or 'base'}",
        }
        return self._row(named, 200, body, None)

    def error(self, named: Named, error: EdgeloraError) -> dict[str, Any]:
        status, code = next((row[1:] for row in _ERROR_CODES if isinstance(error, row[0])), (400, "invalid_request"))
        line = {"line": named.labels["line"]} if "line" in named.labels else {}
        refusal = {"message": error.message, "type": "invalid_request_error", "param": None, "code": code}
        return self._row(named, status, {"error": refusal}, {"code": code, "message": error.message, **line})

    def _row(self, named: Named, status: int, body: Mapping[str, Any], error: Any) -> dict[str, Any]:
        response = {"status_code": status, "request_id": f"req_{named.key}", "body": body}
        id, custom_id = f"{ID_PREFIX}{named.key}", named.labels.get("id")
        return {"id": id, "custom_id": custom_id, "response": response, "error": error}


PLAIN, OPENAI = Plain(), OpenAIBatch()
_ERROR_CODES: tuple[tuple[type[EdgeloraError], int, str], ...] = (
    (ContextOverflowError, 400, "context_length_exceeded"),
    (ModelFileError, 404, "model_not_found"),
)


def format_of(row: Row) -> Format:
    """The shape that a row has."""
    return OPENAI if "custom_id" in row.data and "prompt" not in row.data else PLAIN


def result_of(row: Any) -> Result | None:
    """What a row of an output says of itself; None: no batch wrote it."""
    if not isinstance(row, Mapping):
        return None
    if isinstance(row.get("key"), str) and "adapter" in row:
        labels = {name: row[name] for name in ("id", "line") if name in row}
        return Result(labels, row["key"], "error" in row, str(row["adapter"]))
    id, error, response = row.get("id"), row.get("error"), row.get("response")
    if "custom_id" not in row or not str(id).startswith(ID_PREFIX) or not isinstance(response, Mapping):
        return None
    labels = {"id": row["custom_id"]} if row["custom_id"] is not None else {}
    if isinstance(error, Mapping) and "line" in error:
        labels["line"] = error["line"]
    body = response.get("body")
    adapter = body.get("model") if isinstance(body, Mapping) else None
    return Result(labels, str(id).removeprefix(ID_PREFIX), error is not None, str(adapter))


def _usage(completion: Completion) -> dict[str, int]:
    counts = {"prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens}
    dropped = completion.dropped_tokens  # of a conversation that was cut to fit: never silently
    return counts | ({"dropped_tokens": dropped} if dropped else {})


def _logprobs(tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """As OpenAI has them. A token may end inside a character: its `bytes` are exact, its `token` is not."""
    return [
        {
            "token": token.text.decode("utf-8", errors="replace"),
            "logprob": token.logprob,
            "bytes": list(token.text),
            "top_logprobs": _logprobs(token.top),
        }
        for token in tokens
    ]


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(set(names) - set(OPENAI_FIELDS)))
