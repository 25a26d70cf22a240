"""Regular expressions of JSON schemas (ECMA-262) as GBNF, of what stands between a JSON string's quotes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

Ranges = tuple[tuple[int, int], ...]
LAST = 0x10FFFF
_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = (
    *((0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
    *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
)
_LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
_NOT_AS_THEY_ARE: Ranges = ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF))
_ESCAPED = '"\\\b\f\n\r\t'
_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d{1,4}(?:,\d{0,4})?\})\??")
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u(?!D[89A-F]|d[89a-fA-F])([0-9a-fA-F]{4})")


class PatternError(Exception):
    """What of a pattern is not supported."""


def expression_of(pattern: str) -> str:
    """GBNF for the strings that `pattern` is found in, with `char` for the rule of any character.

    Raises:
        PatternError: look-around, back references, properties, anchors inside, or no regular expression.
    """
    reader = _Reader(pattern)
    text = reader.alternatives(depth=0)
    if not reader.is_done:
        raise PatternError(f") without ( in the pattern {json.dumps(pattern)}")
    return text


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._pattern, self._at = pattern, 0

    @property
    def is_done(self) -> bool:
        return self._at == len(self._pattern)

    def alternatives(self, depth: int) -> str:
        if depth > 50:
            raise self._error("parentheses nested too deeply")
        found = [self._sequence(depth)]
        while self._skip("|"):
            found.append(self._sequence(depth))
        return " | ".join(found)

    def _sequence(self, depth: int) -> str:
        """Outside of parentheses, what is not anchored has any characters around it."""
        parts = [] if depth or self._skip("^") else ["char*"]
        is_anchored = False
        while not self.is_done and self._pattern[self._at] not in "|)":
            if not depth and re.match(r"\$(\||$)", self._pattern[self._at :]):
                self._at, is_anchored = self._at + 1, True
                break
            parts.append(self._repeated(self._atom(depth)))
        parts += [] if depth or is_anchored else ["char*"]
        return " ".join(parts) or '""'

    def _atom(self, depth: int) -> str:
        if self._skip("("):
            if self._skip("?") and not self._skip(":"):
                raise self._error("look-around or a named group")
            inner = self.alternatives(depth + 1)
            if not self._skip(")"):
                raise self._error("( without )")
            return f"({inner})"
        if self._skip("["):
            return self._set(self._class())
        character = self._take()
        if character == ".":
            return self._set(_complement(_LINE_ENDS))
        if character in "^$*+?{}]":
            raise self._error(f"{character} in this place")
        return self._set(self._escape() if character == "\\" else _one(ord(character)))

    def _repeated(self, atom: str) -> str:
        match = _QUANTIFIER.match(self._pattern, self._at)
        if match is None:
            return atom
        self._at = match.end()
        return atom + (match[0][:-1] if len(match[0]) > 1 and match[0].endswith("?") else match[0])

    def _class(self) -> Ranges:
        is_negated, ranges = self._skip("^"), list[tuple[int, int]]()
        while not self._skip("]"):
            first = self._member()
            if not self._pattern.startswith("-]", self._at) and self._skip("-"):
                last = self._member()
                if len(first) != 1 or len(last) != 1 or first[0][0] > last[0][1] or first[0][0] != first[0][1]:
                    raise self._error("a range that is none")
                first = ((first[0][0], last[0][1]),)
            ranges += first
        return _complement(ranges) if is_negated else tuple(ranges)

    def _member(self) -> Ranges:
        character = self._take()
        return self._escape() if character == "\\" else _one(ord(character))

    def _escape(self) -> Ranges:
        if match := _CODE.match(self._pattern, self._at):
            self._at = match.end()
            return _one(int(match[1] or match[2], 16))
        name = self._take()
        if name.lower() in _CLASSES:
            return _CLASSES[name] if name.islower() else _complement(_CLASSES[name.lower()])
        if name in _CONTROLS:
            return _one(_CONTROLS[name])
        if name.isalnum():
            raise self._error(f"\\{name}")
        return _one(ord(name))

    def _set(self, ranges: Ranges) -> str:
        """The rule for one character of `ranges`, escaped where JSON wants it."""
        plain = _without(ranges, _NOT_AS_THEY_ARE)
        escaped = [each for each in _ESCAPED if any(low <= ord(each) <= high for low, high in ranges)]
        ways = [quoted(json.dumps(each)[1:-1]) for each in escaped]
        if plain:
            ways.insert(0, "[" + "".join(f"\\U{low:08X}-\\U{high:08X}" for low, high in plain) + "]")
        if not ways:
            raise self._error("a character that JSON has no short form for")
        return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"

    def _take(self) -> str:
        if self.is_done:
            raise self._error("an end that comes too early")
        self._at += 1
        return self._pattern[self._at - 1]

    def _skip(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _error(self, what: str) -> PatternError:
        return PatternError(f"unsupported in the pattern {json.dumps(self._pattern)}: {what}")


def quoted(text: str) -> str:
    """A GBNF literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _one(code: int) -> Ranges:
    return ((code, code),)


def _complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    return _without(((0, LAST),), ranges)


def _without(ranges: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> Ranges:
    left = list(ranges)
    for low, high in others:
        cut = [((first, min(last, low - 1)), (max(first, high + 1), last)) for first, last in left]
        left = [part for pair in cut for part in pair if part[0] <= part[1]]
    return tuple(left)
