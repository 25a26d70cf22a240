"""A reply, whole or in pieces, to text and calls."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

from edgelora.tools.calls import Family, ToolCall
from edgelora.tools.channel_calls import THOUGHTS, ChannelCalls
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
        either: the reply is calls or text, so that none begin in a text.

    Attributes:
        calls: those that are whole.
        passed: how often something was read that is no text: a call, or a message's header or thoughts.
    """

    def __init__(self, family: Family, tools: Tools, opening: str = "", *, either: bool = False) -> None:
        self._family, self._tools, self._either = family, tools, either
        self._cursor = Cursor()
        self._out: list[str] = []
        self._unsaid = 0  # characters of `opening` that may still come out
        self.calls: list[ToolCall] = []
        self.passed = 0
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

    def _pass(self) -> None:
        self._cursor.drop()
        self.passed += 1

    def _read(self) -> Reading[None]:
        cursor = self._cursor
        if isinstance(self._family, ChannelCalls):
            yield from self._messages(self._family)
            return
        if self._either:
            yield from self._calls_or_text()
            return
        if self._family.begins_reply:
            yield from cursor.skip_space()
            if not (yield from cursor.is_over()) and cursor.text[cursor.at] == "{":
                yield from self._calls(1)
        while (length := (yield from self._next_opening())) > 0:
            yield from self._calls(length)
        if not (self.calls and cursor.text.isspace()):
            self._release()

    def _calls_or_text(self) -> Reading[None]:
        """Read calls, as long as nothing else comes, and then text to the end."""
        cursor, length = self._cursor, len(self._family.opening)
        while not self._out:
            yield from cursor.skip_space()
            space = cursor.at
            if not (yield from cursor.takes(self._family.opening)):
                break
            cursor.at = space
            yield from self._calls(length)
        while not cursor.ended:
            cursor.at = len(cursor.text)
            self._release()
            yield
        cursor.at = len(cursor.text)
        self._release()

    def _messages(self, family: ChannelCalls) -> Reading[None]:
        """Read messages: of those that are text without their headers, of thoughts nothing."""
        cursor, hidden = self._cursor, False
        while not (yield from cursor.is_over()):
            if (yield from family.begins_message(cursor)):
                try:
                    header = family.header((yield from cursor.until(family.header_end)))
                except NoCall:
                    break
                if header.tool:
                    length, cursor.at = cursor.at, 0
                    yield from self._calls(length)
                    continue
                self._pass()
                hidden = header.channel == THOUGHTS
            yield from self._message(family.message_end, hidden=hidden)
        cursor.at = len(cursor.text)
        self._release()

    def _message(self, end: str, *, hidden: bool) -> Reading[None]:
        """Read the text of a message, to behind its end."""
        cursor, done = self._cursor, self._pass if hidden else self._release
        while (found := cursor.text.find(end, cursor.at)) < 0 and not cursor.ended:
            cursor.at = len(cursor.text) - _begun(end, cursor.text)
            done()
            yield
        cursor.at = len(cursor.text) if found < 0 else found
        done()
        if found >= 0:
            cursor.at = len(end)
            self._pass()

    def _next_opening(self) -> Reading[int]:
        """Go to where a call may begin, and release the text before it; the length of what it begins with."""
        cursor, opening = self._cursor, self._family.opening
        while (found := cursor.text.find(opening, cursor.at)) < 0 and not cursor.ended:
            cursor.at = len(cursor.text) - _begun(opening, cursor.text)
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
            self._pass()


def _begun(literal: str, text: str) -> int:
    """Length of the end of `text` that may become `literal`."""
    lengths = range(min(len(literal) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(literal[:n])), 0)
