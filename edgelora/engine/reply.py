"""Bytes of tokens to pieces of text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class ReplyText:
    """Text that is safe to show, as tokens come in.

    A character is held back until all its bytes are there, and text until it cannot be the beginning of a stop string
    any more. Bytes that are no UTF-8 become U+FFFD.

    Attributes:
        stopped: a stop string was found; it and what follows are not part of the reply.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """The text that may be shown after `data` came in, often empty."""
        self._held += self._decoder.decode(data)
        if not self._stops:
            return self._release(len(self._held))
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self._release(len(self._held))
        return self._release(len(self._held) - self._begun_stop())

    def end(self) -> str:
        """What was held back, when no more bytes come."""
        self._held += self._decoder.decode(b"", final=True)
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _begun_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._begins_stop(self._held[-n:])), 0)

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
