"""Replies that should be JSON: whether they are, and which fields of the reference they have right.

A field is a path to a value that is neither object nor list:

    {"name": "Mina", "items": [{"n": 11}]}      name: "Mina"      items.0.n: 11

A reply's fields count as right where the reference has the same value at the same path; fields that one has and the
other has not count as wrong: what is made up costs as much as what is missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_DEPTH = 64
Fields = Mapping[str, Any]


class NotJSONError(ValueError):
    """A text that is no JSON."""


def parse_json(text: str) -> Any:
    """The value of a text that is JSON and nothing else.

    Raises:
        NotJSONError: it is not; NaN and infinities are none, as the standard has it.
    """
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise NotJSONError(str(error)) from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def is_json(reply: str) -> float:
    """1 where the reply is JSON and nothing else."""
    try:
        parse_json(reply)
    except NotJSONError:
        return 0.0
    return 1.0


def fields_of(value: Any) -> dict[str, Any]:
    """Path to value. An empty object or list is a value of its own; so is what is nested deeper than `MAX_DEPTH`."""
    return dict(_leaves(value, ""))


def _leaves(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    items: list[tuple[Any, Any]] = []
    if depth < MAX_DEPTH and isinstance(value, dict):
        items = list(value.items())
    elif depth < MAX_DEPTH and isinstance(value, list):
        items = list(enumerate(value))
    if not items:
        yield path, value
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key), depth + 1)


def field_counts(reply: str, reference: str) -> tuple[int, int, dict[str, bool]]:
    """How many fields are right, of how many; and of each field of the reference whether it is.

    Raises:
        NotJSONError: the reference is not JSON; a reply that is not has no field right.
    """
    wanted = fields_of(parse_json(reference))
    try:
        found = fields_of(parse_json(reply))
    except NotJSONError:
        found = {}
    right = {path: path in found and _same(found[path], value) for path, value in wanted.items()}
    return sum(right.values()), len({*wanted, *found}), right


def field_shares(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Of each field of the references, in how many rows that have it the reply has it right; items of lists count
    together (`items.*.n`).

    Args:
        pairs: (reply, reference).
    """
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for reply, reference in pairs:
        for path, is_right in field_counts(reply, reference)[2].items():
            name = ".".join("*" if part.isdecimal() else part for part in path.split("."))
            right[name] += is_right
            total[name] += 1
    return {name: right[name] / count for name, count in total.items()}


def _same(one: Any, other: Any) -> bool:
    """1 and 1.0 are one number; true and 1 are not one value."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
