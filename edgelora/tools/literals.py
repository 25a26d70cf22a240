"""Values in calls that are not JSON: as Python writes them, or in quotes that are a token.

{'city': 'Oslo', 'exact': True}                 PYTHON; JSON's own way is read too
{city:<|"|>Oslo<|"|>,exact:true}                TOKEN_QUOTES
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from edgelora.tools.cursor import Cursor, NoCall, Reading, parsed_json

MAX_DEPTH = 64
_NAMES = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_ESCAPE = re.compile(r"""((?:\\u[0-9a-fA-F]{4})+)|\\x([0-9a-fA-F]{2})|\\([\\'"/nrtbf])""")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_NOT_IN_NAMES = frozenset("{}[](),\n")


@dataclass(frozen=True)
class Notation:
    """How texts are written; brackets and numbers are as in JSON.

    Attributes:
        quotes: what a text stands between, each a way.
        escapes: a backslash in a text has a meaning.
    """

    quotes: tuple[str, ...]
    escapes: bool


PYTHON = Notation(("'", '"'), escapes=True)
TOKEN_QUOTES = Notation(('<|"|>',), escapes=False)


def value(cursor: Cursor, notation: Notation, depth: int = 0) -> Reading[Any]:
    """The value that is next.

    Raises:
        NoCall: there is none, or it is nested deeper than `MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise NoCall
    yield from cursor.skip_space()
    if (yield from cursor.takes("{")):
        return (yield from members(cursor, notation, ":", "}", depth))
    if (yield from cursor.takes("[")):
        return (yield from _items(cursor, notation, depth))
    for quote in notation.quotes:
        if (yield from cursor.takes(quote)):
            return (yield from _text(cursor, quote, notation))
    word = yield from cursor.word("+-.")
    return _NAMES[word] if word in _NAMES else parsed_json(word)


def members(cursor: Cursor, notation: Notation, equals: str, end: str, depth: int = 0) -> Reading[dict[str, Any]]:
    """The names and values that are next, up to `end`, behind which the cursor is then."""
    found: dict[str, Any] = {}
    yield from cursor.skip_space()
    while not (yield from cursor.takes(end)):
        if found:
            yield from cursor.expect(",")
        name = yield from _name(cursor, notation, equals)
        if name in found:
            raise NoCall
        found[name] = yield from value(cursor, notation, depth + 1)
        yield from cursor.skip_space()
    return found


def _items(cursor: Cursor, notation: Notation, depth: int) -> Reading[list[Any]]:
    found: list[Any] = []
    yield from cursor.skip_space()
    while not (yield from cursor.takes("]")):
        if found:
            yield from cursor.expect(",")
        found.append((yield from value(cursor, notation, depth + 1)))
        yield from cursor.skip_space()
    return found


def _name(cursor: Cursor, notation: Notation, equals: str) -> Reading[str]:
    """A name, in quotes or bare, and what it equals is behind the cursor then."""
    yield from cursor.skip_space()
    for quote in notation.quotes:
        if (yield from cursor.takes(quote)):
            name: str = yield from _text(cursor, quote, notation)
            yield from cursor.skip_space()
            yield from cursor.expect(equals)
            return name
    name = (yield from cursor.until(equals)).rstrip()
    if not name or _NOT_IN_NAMES & set(name):
        raise NoCall
    return name


def _text(cursor: Cursor, quote: str, notation: Notation) -> Reading[str]:
    """The text up to `quote`, behind which the cursor is then."""
    begin = at = cursor.at
    stop = re.compile(re.escape(quote) + (r"|\\" if notation.escapes else ""))
    while (found := stop.search(cursor.text, at)) is None or found[0] == "\\":
        if found:
            at = found.end() + 1
        else:
            at = max(at, len(cursor.text) - len(quote) + 1)
            yield from cursor.more()
    cursor.at = found.end()
    text = cursor.text[begin : found.start()]
    return _ESCAPE.sub(_unescaped, text) if notation.escapes else text


def _unescaped(escape: re.Match[str]) -> str:
    codes, byte, character = escape.groups()
    if codes:
        return str(json.loads(f'"{codes}"'))
    return chr(int(byte, 16)) if byte else _ESCAPED.get(character, character)
