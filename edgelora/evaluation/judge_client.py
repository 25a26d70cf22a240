"""Questions to a model behind an OpenAI-compatible endpoint, with bounds on everything: time, size, tries."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from edgelora.errors import EdgeloraError, SettingsError
from edgelora.messages import Message

TRIES = 5
TIMEOUT_SECONDS = 120.0
"""Of a try: from the connection to the last byte of the answer."""
STOP_SECONDS = 0.2
"""How often a try looks whether anybody waits for it still."""
MAX_WAIT_SECONDS = 60.0
MAX_ANSWER_BYTES = 4 << 20
MAX_TOKENS = 512
MAX_SHOWN = 300
TRY_AGAIN = (408, 409, 425, 429)
"""Statuses that another try may change, beside those from 500 on."""
OF_THE_QUESTION = (400, 413, 422)
"""Statuses that may be about what was asked, and not about who asks or which model."""
_PATH = "/chat/completions"


class QuestionRefusedError(EdgeloraError):
    """The endpoint will not answer this question, for instance because it is too long; it may answer others."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key along to wherever it points."""

    def redirect_request(self, *_arguments: Any, **_more: Any) -> None:
        return None


@dataclass(frozen=True)
class _Answer:
    """What came back; `retry_after` is the header of that name."""

    status: int
    body: bytes
    retry_after: str | None = None


@dataclass(frozen=True)
class JudgeClient:
    """One model.

    Attributes:
        url: of the API, as OpenAI's clients take it: `http://localhost:8000/v1`.
        key_variable: name of the environment variable that holds the key; empty for none.
        first_wait: seconds before the second try; each later one waits twice as long.
        timeout: seconds that a try may take.
        stop: once it is set, nothing is waited for any more.

    Raises:
        SettingsError: no http(s) address, no model, or a variable that is not set.
    """

    url: str
    model: str
    key_variable: str = ""
    first_wait: float = 1.0
    timeout: float = TIMEOUT_SECONDS
    stop: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"--judge {self.url!r} is no address", hint="Write --judge http://localhost:8000/v1.")
        if parts.username or parts.password:
            raise SettingsError("--judge has a password in its address", hint="Name a variable: --judge-key-env NAME.")
        if not self.model:
            raise SettingsError("--judge needs the name of a model", hint="Add --judge-model NAME.")
        if self.key_variable and not os.environ.get(self.key_variable):
            raise SettingsError(f"--judge-key-env {self.key_variable}: the variable is not set")

    def ask(self, messages: Sequence[Message]) -> str:
        """The model's reply, at temperature 0.

        Raises:
            QuestionRefusedError: this request is refused.
            EdgeloraError: all are, or the endpoint could not be reached in `TRIES` tries.
        """
        body = {"model": self.model, "messages": list(messages), "temperature": 0, "max_tokens": MAX_TOKENS}
        problem = ""
        for number in range(TRIES):
            if number and self.stop.wait(min(MAX_WAIT_SECONDS, self.first_wait * 2 ** (number - 1))):
                break
            try:
                answer = self._in_time(body)
                if answer.status < 300:
                    return _content(answer.body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = str(getattr(error, "reason", error))
                continue
            problem = f"{answer.status} {_shown(answer.body)}"
            if answer.status not in TRY_AGAIN and answer.status < 500:
                kind = QuestionRefusedError if answer.status in OF_THE_QUESTION else EdgeloraError
                raise kind(f"the judge at {self.url} refuses: {problem}")
            self._obey(answer.retry_after)
        raise EdgeloraError(
            f"the judge at {self.url} gave no answer in {TRIES} tries: {problem}",
            hint="Run the same command again: it goes on where this one ended (with -o).",
        )

    def _obey(self, seconds: str | None) -> None:
        """Wait as long as the endpoint asks, within bounds."""
        if seconds and seconds.isascii() and seconds.isdigit():
            self.stop.wait(min(MAX_WAIT_SECONDS, float(seconds)))

    def _in_time(self, body: Mapping[str, Any]) -> _Answer:
        """What came back within `timeout`, however slowly it drips.

        A socket's own timeout is for each of its reads. So a try has a thread, which is left to itself when its time is
        over, or when nobody waits any more; it keeps no process from ending.
        """
        answer: Future[_Answer] = Future()

        def post() -> None:
            try:
                answer.set_result(self._post(body))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=post, name="edgelora-judge-try", daemon=True).start()
        end = time.monotonic() + self.timeout
        while not answer.done() and not self.stop.is_set() and (left := end - time.monotonic()) > 0:
            wait([answer], min(STOP_SECONDS, left))
        if not answer.done():
            raise TimeoutError("stopped" if self.stop.is_set() else f"no whole answer within {self.timeout:g} s")
        return answer.result()

    def _post(self, body: Mapping[str, Any]) -> _Answer:
        address = self.url.rstrip("/")
        address = address if address.endswith(_PATH) else address + _PATH
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable].strip()}"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            # Whoever waits stops first, and says so.
            opener, timeout = urllib.request.build_opener(_NoRedirects), self.timeout + STOP_SECONDS
            with opener.open(request, timeout=timeout) as response:
                answer = _Answer(response.status, response.read(MAX_ANSWER_BYTES + 1))
        except urllib.error.HTTPError as error:
            with error:
                return _Answer(error.code, error.read(MAX_ANSWER_BYTES), error.headers.get("Retry-After"))
        if len(answer.body) > MAX_ANSWER_BYTES:
            raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        return answer


def _content(answer: bytes) -> str:
    """The text of a chat completion.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise ValueError(f"no chat completion: {_shown(answer)}") from None
    return content if isinstance(content, str) else ""


def _shown(answer: bytes) -> str:
    return " ".join(answer[:MAX_SHOWN].decode("utf-8", "replace").split())
