"""A reply that is read while it comes: readers are generators, which wait for more of it by yielding."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator
from typing import Any, TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')
_FIRST = {"{": '"}', "[": "{]"}  # what may come first in an object, and in a list of objects


class NoCall(Exception):
    """What looked like the beginning of a call is none."""


class RefusedCall(NoCall):
    """A whole call, up to where the cursor is, that cannot be followed: of an unknown tool, or without arguments."""


class Cursor:
    """The text of a reply that is not decided on yet, and how far it was looked at.

    Attributes:
        ended: no more of it comes.
    """

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False

    def drop(self) -> str:
        """Decide on what is before the cursor, which is given back."""
        before, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        return before

    def more(self) -> Reading[None]:
        """Wait for more of the reply.

        Raises:
            NoCall: there is no more.
        """
        if self.ended:
            raise NoCall
        yield

    def is_over(self) -> Reading[bool]:
        """Whether nothing is behind the cursor."""
        while self.at >= len(self.text) and not self.ended:
            yield
        return self.at >= len(self.text)

    def skip_space(self) -> Reading[None]:
        while not (yield from self.is_over()) and self.text[self.at].isspace():
            self.at += 1

    def takes(self, literal: str) -> Reading[bool]:
        """Whether `literal` is next; the cursor is behind it then."""
        while not self.ended and len(self.text) - self.at < len(literal) and literal.startswith(self.text[self.at :]):
            yield
        if not self.text.startswith(literal, self.at):
            return False
        self.at += len(literal)
        return True

    def expect(self, literal: str) -> Reading[None]:
        """Go behind `literal`.

        Raises:
            NoCall: it is not next.
        """
        if not (yield from self.takes(literal)):
            raise NoCall

    def until(self, literal: str, start: int | None = None) -> Reading[str]:
        """The text up to the next `literal`; the cursor is behind it then."""
        begin = self.at if start is None else start
        while (end := self.text.find(literal, begin)) < 0:
            begin = max(begin, len(self.text) - len(literal) + 1)
            yield from self.more()
        text, self.at = self.text[self.at : end], end + len(literal)
        return text

    def word(self, others: str = "_-.:") -> Reading[str]:
        """The name that is next: letters, digits and `others`."""
        end = self.at
        while True:
            while end < len(self.text) and (self.text[end].isalnum() or self.text[end] in others):
                end += 1
            if end < len(self.text) or self.ended:
                break
            yield
        word, self.at = self.text[self.at : end], end
        if not word:
            raise NoCall
        return word

    def json(self) -> Reading[Any]:
        """The JSON object or list of objects that is next.

        Raises:
            NoCall: there is none.
        """
        begin, at, depth, in_string = self.at, self.at, 0, False
        yield from self._begins_json()
        while True:
            found = (_STRING_END if in_string else _STRUCTURE).search(self.text, at)
            if found is None:
                at = max(at, len(self.text))
                yield from self.more()
                continue
            at = found.end()
            match found[0]:
                case "\\":
                    at += 1
                case '"':
                    in_string = not in_string
                case "{" | "[":
                    depth += 1
                case _:
                    depth -= 1
            if depth == 0:
                break
        self.at = at
        return parsed_json(self.text[begin:at])

    def _begins_json(self) -> Reading[None]:
        begin = self.at
        if (yield from self.is_over()) or self.text[begin] not in _FIRST:
            raise NoCall
        self.at += 1
        yield from self.skip_space()
        if self.at < len(self.text) and self.text[self.at] not in _FIRST[self.text[begin]]:
            self.at = begin
            raise NoCall
        self.at = begin


def parsed_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        NoCall: it is no JSON, or holds numbers that JSON cannot write again.
    """
    try:
        return json.loads(text, parse_constant=_refused, parse_float=_finite)
    except (ValueError, RecursionError):
        raise NoCall from None


def _refused(constant: str) -> Any:
    raise ValueError(constant)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number
