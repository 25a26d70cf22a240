"""What a setting may be: the test, and the words for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bound:
    """What a setting may be.

    Attributes:
        wanted: the words for it, after "expected".
        choices: the values themselves, where they can be listed.
        kind: what an option's text is turned into.
    """

    accepts: Callable[[Any], bool]
    wanted: str
    choices: tuple[str, ...] = ()
    kind: type = str

    def or_none(self) -> Bound:
        return Bound(lambda v: v is None or self.accepts(v), self.wanted, self.choices, self.kind)


def number(low: float, high: float, wanted: str, *, above: bool = False) -> Bound:
    def accepts(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return (low < value if above else low <= value) and value <= high

    return Bound(accepts, wanted, kind=float)


def whole(low: int, wanted: str, high: int = 2**32 - 1) -> Bound:
    return Bound(lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high, wanted, kind=int)


def one_of(names: tuple[str, ...]) -> Bound:
    return Bound(lambda v: v in names, f"one of {', '.join(names)}", names)


def some_of(names: tuple[str, ...]) -> Bound:
    """One or more of `names`, with commas between them."""
    return Bound(
        lambda v: isinstance(v, str) and all(name.strip() in names for name in v.split(",")),
        f"one or more of {', '.join(names)}",
    )


def _module_names(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and all(name.strip() for name in value.split(","))


COUNT = whole(1, "a whole number, 1 or more")
TEXT = Bound(lambda v: isinstance(v, str) and bool(v), "text that is not empty")
FLAG = Bound(lambda v: isinstance(v, bool), "true or false", kind=bool)
MODULES = Bound(_module_names, "module names with commas between them, or all-linear")
