"""Which pattern of `rank_pattern` or `alpha_pattern` belongs to a module, also among those of 18,000 experts.

    Patterns({"q_proj": 4, "layers.1": 2}).key("model.layers.1.self_attn.q_proj")      "q_proj"

PEFT tries one regular expression after another (`get_pattern_key`, peft/utils/other.py). Most are names, in which only
the dots are special: those are looked up, by the lengths and places of dots that occur.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MATCH = r"(.*\.)?({})$"  # as PEFT wraps a pattern
NAME = re.compile(r"[A-Za-z0-9_.]+")
MAX_EXPRESSIONS, MAX_SHAPES = 256, 4096
Shape = tuple[int, tuple[int, ...]]


class Patterns:
    """Patterns in their order."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._names: dict[Shape, dict[str, tuple[int, str]]] = {}
        self._expressions: list[tuple[int, str, re.Pattern[str]]] = []
        for number, pattern in enumerate(patterns):
            if is_name(pattern):
                self._names.setdefault(_shape(pattern), {}).setdefault(pattern, (number, pattern))
            else:
                self._expressions.append((number, pattern, re.compile(MATCH.format(pattern))))

    def key(self, module: str) -> str:
        """The first pattern that matches a module's name, else the name."""
        found = [entry for shape in self._names if (entry := self._named(shape, module))]
        first = min(found, default=None)
        for number, pattern, expression in self._expressions:
            if first and number > first[0]:
                break
            if expression.match(module):
                return pattern
        return first[1] if first else module

    def keys(self, module: str) -> list[str]:
        """All patterns that match a module's name, in their order."""
        found = [entry for shape in self._names if (entry := self._named(shape, module))]
        found += [(number, pattern) for number, pattern, expression in self._expressions if expression.match(module)]
        return [pattern for _, pattern in sorted(found)]

    def _named(self, shape: Shape, module: str) -> tuple[int, str] | None:
        length, dots = shape
        start = len(module) - length
        if start < 0 or (start and module[start - 1] != "."):
            return None
        ending = [*module[start:]]
        for dot in dots:
            ending[dot] = "."  # which stands for any character
        return self._names[shape].get("".join(ending))


def is_name(pattern: str) -> bool:
    return NAME.fullmatch(pattern) is not None


def too_many(patterns: Iterable[str]) -> str:
    """Why they would take too long to try; "" where they do not."""
    names, expressions = set(), 0
    for pattern in patterns:
        if is_name(pattern):
            names.add(_shape(pattern))
        else:
            expressions += 1
    if expressions <= MAX_EXPRESSIONS and len(names) <= MAX_SHAPES:
        return ""
    return "too many regular expressions; write the modules' names out"


def _shape(name: str) -> Shape:
    return len(name), tuple(place for place, letter in enumerate(name) if letter == ".")
