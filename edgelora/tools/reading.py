"""A reply, whole or in pieces, to text and calls."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

from edgelora.tools.calls import Family, ToolCall
from edgelora.tools.cursor import Cursor, NoCall, Reading, RefusedCall
from edgelora.tools.definitions import Tools

_ID = string.ascii_letters + string.digits


def new_call_id() -> str:
    """An id for a call: nine letters and digits, which is what Mistral's templates take."""
    return "".join(secrets.choice(_ID) for _ in range(9))


@dataclass(frozen=True)
class Parsed:
    """A reply.

    Attributes:
        content: what of it is no call; all of it, to the last space, where there is none.
    """

    content: str
    calls: tuple[ToolCall, ...]


def parse(text: str, family: Family, tools: Tools, opening: str = "") -> Parsed:
    """What a whole reply says; `opening` as of `Parser`."""
    parser = Parser(family, tools, opening)
    content = parser.feed(text)
    return Parsed(content + parser.end(), tuple(parser.calls))


class Parser:
    """Reads a reply while it comes.

    What looks like a call and is none (of an unknown tool, not JSON, cut off) is text. White space before a call and
    at the end is dropped where there are calls.

    Args:
        opening: what of the reply is in the prompt already: the beginning of a call. It is no part of the text.

    Attributes:
        calls: those that are whole.
    """

    def __init__(self, family: Family, tools: Tools, opening: str = "") -> None:
        self._family, self._tools = family, tools
        self._cursor = Cursor()
        self._out: list[str] = []
        self._unsaid = 0  # characters of `opening` that may still come out
        self.calls: list[ToolCall] = []
        self._steps = self._read()
        self._unsaid = len(opening) - len(self.feed(opening))

    def feed(self, piece: str) -> str:
        """More of the reply: gives the text that is no part of a call for certain, often empty."""
        self._cursor.text += piece
        if not self._cursor.ended:
            next(self._steps, None)
        return self._released()

    def end(self) -> str:
        """The reply is over: gives the rest of its text."""
        self._cursor.ended = True
        for _ in self._steps:
            pass
        return self._released()

    def _released(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        said = min(self._unsaid, len(text))
        self._unsaid -= said
        return text[said:]

    def _release(self) -> None:
        self._out.append(self._cursor.drop())

    def _read(self) -> Reading[None]:
        cursor = self._cursor
        if self._family.begins_reply:
            yield from cursor.skip_space()
            if not (yield from cursor.is_over()) and cursor.text[cursor.at] == "{":
                yield from self._calls(1)
        while (length := (yield from self._next_opening())) > 0:
            yield from self._calls(length)
        if not (self.calls and cursor.text.isspace()):
            self._release()

    def _next_opening(self) -> Reading[int]:
        """Go to where a call may begin, and release the text before it; the length of what it begins with."""
        cursor, opening = self._cursor, self._family.opening
        while (found := cursor.text.find(opening, cursor.at)) < 0 and not cursor.ended:
            cursor.at = len(cursor.text) - self._begun_opening()
            cursor.at = len(cursor.text[: cursor.at].rstrip())
            self._release()
            yield
        if found < 0:
            cursor.at = len(cursor.text)
            return 0
        cursor.at = len(cursor.text[:found].rstrip())
        space = found - cursor.at
        self._release()
        cursor.at = space
        return len(opening)

    def _begun_opening(self) -> int:
        """Length of the end of the text that may become an opening."""
        text, opening = self._cursor.text, self._family.opening
        lengths = range(min(len(opening) - 1, len(text)), 0, -1)
        return next((n for n in lengths if text.endswith(opening[:n])), 0)

    def _calls(self, length: int) -> Reading[None]:
        """Read calls where the cursor is; as text goes what is none, at least `length` of it."""
        cursor, begin = self._cursor, self._cursor.at
        try:
            found = yield from self._family.read(cursor, self._tools)
        except RefusedCall:
            self._release()
        except NoCall:
            cursor.at = begin + length
            self._release()
        else:
            self.calls += found
            cursor.drop()
