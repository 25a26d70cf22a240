"""The fields of a JSON body, read one by one. Every problem of a body is told at once; `param` is the first one's.

    fields = Fields({"n": 2, "stop": [3], "frobnicate": 1}, refused={})
    fields.read("n", whole(1, 16), 1)                                        # 2
    fields.read("stop", lambda value: each(value, text, "a list"), [])       # [], and a problem at stop[0]
    fields.ignored                                                           # ("frobnicate",)
    fields.end()                                                             # ApiError, whose param is stop[0]

A reader takes a value and gives what it stands for, or raises `Problem`. It is never given what JSON does not have, or
has too deep: NaN, 1e400 and half characters are refused before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

from edgelora.serve.problems import ApiError

T = TypeVar("T")

INVALID_TYPE, INVALID_VALUE = "invalid_type", "invalid_value"
MISSING, UNSUPPORTED_FIELD = "missing_required_parameter", "unsupported_parameter"
UNSUPPORTED_VALUE = "unsupported_value"
MAX_DEPTH = 200
"""Lists and objects in one another; a JSON schema of 64 levels, the most that become a grammar, is some 130 deep."""
MAX_SHOWN, MAX_PROBLEMS = 400, 8
MAX_IGNORED, MAX_NAME = 32, 64
_MAX_BITS = 1024
"""Beyond, a whole number is no float any more; and at 4,300 digits Python refuses to print it."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_TYPES: tuple[tuple[type[Any], str], ...] = (
    (Mapping, "an object"),
    (list, "a list"),
    (str, "text"),
    (bool, "true or false"),
    (int, "a number"),
    (float, "a number"),
    (type(None), "null"),
)


class Problem(Exception):
    """What is wrong with a value, as what follows its name in a sentence; `at` is where inside of it."""

    def __init__(self, message: str, code: str = INVALID_VALUE, at: str = "") -> None:
        super().__init__(message)
        self.message, self.code, self.at = message, code, at


class Fields:
    """The fields of a body. A null stands for a field that was not given.

    Args:
        refused: fields that cannot be followed, and why.
        meaningless: fields that change nothing, and are not worth a word.

    Raises:
        ApiError: the body is no object.
    """

    def __init__(self, body: object, refused: Mapping[str, str], meaningless: tuple[str, ...] = ()) -> None:
        if not isinstance(body, Mapping):
            raise ApiError(400, f"the body is {type_of(body)}, expected a JSON object", code=INVALID_TYPE)
        self._given = {str(name): value for name, value in body.items() if value is not None}
        self._known = {*meaningless, *refused}
        self._problems: list[tuple[str, str, str]] = []
        for name in refused:
            if name in self._given:
                self.refuse(name, refused[name], UNSUPPORTED_FIELD)

    def read(self, name: str, reader: Callable[[Any], T], missing: T) -> T:
        """What a field stands for; `missing` where it is not given, or wrong."""
        self._known.add(name)
        if name not in self._given:
            return missing
        try:
            _check_plain(self._given[name])
            return reader(self._given[name])
        except Problem as problem:
            self.refuse(name + problem.at, problem.message, problem.code)
            return missing

    def need(self, name: str, reader: Callable[[Any], T], missing: T) -> T:
        """As `read`, but it is a problem where it is not given."""
        if name not in self._given:
            self.refuse(name, "is missing", MISSING)
        return self.read(name, reader, missing)

    def refuse(self, param: str, message: str, code: str = INVALID_VALUE) -> None:
        self._problems.append((_cut(param), f"{_cut(param)} {_cut(message)}", code))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names that nothing has asked for; written as in a URL, so that they fit a header."""
        names = [name for name in self._given if name not in self._known]
        return tuple(quote(name[:MAX_NAME], errors="replace") for name in names[:MAX_IGNORED])

    def end(self) -> None:
        """Raises: ApiError, 400, if anything was wrong."""
        if self._problems:
            message = "; ".join(message for _, message, _ in self._problems[:MAX_PROBLEMS])
            param, _, code = self._problems[0]
            raise ApiError(400, message, param=param, code=code)


def text(value: Any) -> str:
    return _typed(value, str, "text")


def flag(value: Any) -> bool:
    return _typed(value, bool, "true or false")


def mapping(value: Any) -> dict[str, Any]:
    return _typed(value, dict, "an object")


def raw(value: Any) -> Any:
    """Whatever it is."""
    return value


def whole(low: int, high: int) -> Callable[[Any], int]:
    """A reader of whole numbers."""

    def read(value: Any) -> int:
        wanted = f"a whole number from {low} to {high}"
        if isinstance(value, bool):
            raise Problem(f"is {shown(value)}, expected {wanted}", INVALID_TYPE)
        if not low <= _typed(value, int, wanted) <= high:
            raise Problem(f"is {shown(value)}, expected {wanted}")
        return int(value)

    return read


def number(low: float, high: float) -> Callable[[Any], float]:
    """A reader of numbers."""

    def read(value: Any) -> float:
        wanted = f"a number from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Problem(f"is {shown(value)}, expected {wanted}", INVALID_TYPE)
        if not low <= value <= high:
            raise Problem(f"is {shown(value)}, expected {wanted}")
        return float(value)

    return read


def one_of(*values: str) -> Callable[[Any], str]:
    """A reader of texts of which there are few."""

    def read(value: Any) -> str:
        wanted = f"one of {', '.join(values)}"
        if _typed(value, str, wanted) not in values:
            raise Problem(f"is {shown(value)}, expected {wanted}")
        return str(value)

    return read


def each(value: Any, reader: Callable[[Any], T], wanted: str) -> list[T]:
    """The items of a list."""
    return [inner(item, reader, f"[{index}]") for index, item in enumerate(_typed(value, list, wanted))]


def member(value: Mapping[str, Any], name: str, reader: Callable[[Any], T]) -> T:
    """A field of an object, which has to be there."""
    if value.get(name) is None:
        raise Problem("is missing", MISSING, f".{name}")
    return inner(value[name], reader, f".{name}")


def inner(value: Any, reader: Callable[[Any], T], at: str) -> T:
    """A value inside of another one."""
    try:
        return reader(value)
    except Problem as problem:
        raise Problem(problem.message, problem.code, at + problem.at) from None


def shown(value: Any) -> str:
    """A value for a message: simple ones as they are, of others the kind."""
    return type_of(value) if isinstance(value, Mapping | list) else _cut(repr(value))


def type_of(value: Any) -> str:
    return next((name for kind, name in _TYPES if isinstance(value, kind)), "no JSON value")


def _typed(value: Any, kind: type[T], wanted: str) -> T:
    if not isinstance(value, kind):
        raise Problem(f"is {shown(value)}, expected {wanted}", INVALID_TYPE)
    return value


def _cut(message: str) -> str:
    return message if len(message) <= MAX_SHOWN else f"{message[:MAX_SHOWN]}..."


def _check_plain(value: Any) -> None:
    """Refuses what no text and no number here can be. Level by level: what is nested too deeply exhausts recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise Problem(f"is nested deeper than {MAX_DEPTH}")
        for item in level:
            _check_simple(item)
        level = [item for outer in level for item in _inside(outer)]


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _check_simple(value: Any) -> None:
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise Problem("holds half a character (a surrogate without its other half)")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise Problem("holds a number that is not finite")
    elif isinstance(value, int) and value.bit_length() >= _MAX_BITS:
        raise Problem("holds a number with too many digits")
