"""What the server and its engine process say to each other: JSON, a line each, over a socket pair.

to the engine:    {"id": 7, "do": "generate", "arguments": {...}}      an id of the server's choice
                  {"id": 7, "do": "cancel"}
                  {"do": "ping"}                                       answered at once by "alive", see `pulse`
from the engine:  {"id": 7, "piece": "Hel", "logprobs": [...]}         of a reply, as it is written
                  {"id": 7, "result": {...}}                           the end of anything that was asked
                  {"id": 7, "error": {"kind": ..., "message": ..., "hint": ...}}
                  {"event": "ready" | "failed" | "loading" | "loaded" | "alive", ...}
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import IO, Any

from edgelora import errors
from edgelora.engine.stream import Completion, Request, TokenLogprob
from edgelora.errors import EdgeloraError, SettingsError

MAX_LINE_BYTES = 1 << 26
"""A conversation of a whole large context window is some megabytes."""

KINDS: dict[str, type[EdgeloraError]] = {
    kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EdgeloraError)
}


def line(message: dict[str, Any]) -> bytes:
    """A message as it goes over the socket.

    Raises:
        SettingsError: it is longer than the other side reads.
    """
    data = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
    if len(data) > MAX_LINE_BYTES:
        raise SettingsError(f"{len(data)} bytes at once are too many; at most {MAX_LINE_BYTES}", hint="Ask for less.")
    return data


def parsed(data: bytes) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(data.decode("utf-8", "surrogatepass"))
    return message


def whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """What the other side says, until it says no more; half a line, which it died in, is none."""
    while (data := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
        yield data


def error_fields(error: BaseException) -> dict[str, str]:
    """An error for the other side: its kind, or "" for a bug, whose text stays in the log."""
    if isinstance(error, EdgeloraError):
        return {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    return {"kind": "", "message": f"{type(error).__name__}: {error}", "hint": ""}


class EngineBugError(RuntimeError):
    """Something in the engine's process that is no error on purpose."""


def error_of(fields: dict[str, str]) -> Exception:
    """The error that the other side sent."""
    kind = KINDS.get(fields["kind"])
    return kind(fields["message"], hint=fields["hint"]) if kind else EngineBugError(fields["message"])


def request_fields(request: Request) -> dict[str, Any]:
    """A request as JSON; its sampling is a mapping of what differs from the adapter's defaults."""
    fields = {name: getattr(request, name) for name in Request.__dataclass_fields__}
    sampling = fields["sampling"]
    if sampling is not None and not isinstance(sampling, dict):
        raise TypeError("a request's sampling goes over the socket as a mapping")
    if sampling and "logit_bias" in sampling:  # JSON has no keys that are numbers
        sampling = {**sampling, "logit_bias": list(map(list, sampling["logit_bias"].items()))}
    return {**fields, "sampling": sampling}


def request_of(fields: dict[str, Any]) -> Request:
    sampling = fields["sampling"]
    if sampling and "logit_bias" in sampling:
        fields = {**fields, "sampling": {**sampling, "logit_bias": dict(map(tuple, sampling["logit_bias"]))}}
    return Request(**fields)


def logprob_fields(token: TokenLogprob) -> list[Any]:
    return [
        token.token,
        base64.b64encode(token.text).decode(),
        token.logprob,
        [logprob_fields(each) for each in token.top],
    ]


def logprob_of(fields: list[Any]) -> TokenLogprob:
    token, text, logprob, top = fields
    return TokenLogprob(token, base64.b64decode(text), logprob, tuple(logprob_of(each) for each in top))


def completion_fields(completion: Completion) -> dict[str, Any]:
    """An account without its text and log probabilities, which went ahead of it in pieces."""
    fields = asdict(completion)
    del fields["text"], fields["logprobs"]
    return fields
