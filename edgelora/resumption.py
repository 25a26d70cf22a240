"""What an earlier run of a batch has done already, and what of it may not be mixed with this run.

A row's identity is its `id`; where it has none, what it says and how often that was said before it, so that a line
inserted above costs nothing. A row of the output is

- done, where identity and key are wanted; error rows too, since the same row would fail the same way (`retry_errors`
  does those again);
- replaced, where it is an error that another adapter, setting or edit may mend, or that is not in the input any more;
- a stranger otherwise: a result of an edited row, of another input, base, adapter content or setting. Strangers are
  refused unless `redo` replaces them.

What is replaced stays in the file until the rows in its place are written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.errors import DataFileError


@dataclass(frozen=True)
class Resumed:
    """What is in the output already.

    Attributes:
        done: identities that need no work; True for error rows.
        replaced: 0-based places of the rows to drop at the end.
    """

    done: Mapping[str, bool]
    replaced: frozenset[int]


class Identities:
    """Names rows, in the order of their file."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, str, bool]] = Counter()

    def name(self, labels: Mapping[str, Any], key: str, *, is_error: bool = False) -> str:
        """The identity of the next row: `labels` are its `id`, its `line`, or both for an id used twice.

        Errors are counted apart: the error of a row may stand in the output beside its later result.
        """
        known = json.dumps(labels["id"], sort_keys=True) if "id" in labels else ""
        if "line" not in labels:
            return f"id {known}"
        self._seen[known, key, is_error] += 1
        number = self._seen[known, key, is_error]
        return f"{f'id {known}, ' if known else ''}row {said_of(key)}, number {number}"


def said_of(key: str) -> str:
    """The half of a key that stands for what the row said; the other stands for what answered it."""
    return key.partition(".")[0]


def reconcile(
    rows: Iterable[Mapping[str, Any]],
    wanted: Mapping[str, str],
    output: Path | str,
    *,
    redo: bool = False,
    retry_errors: bool = False,
) -> Resumed:
    """Compare the output's `rows` with the identities and keys that are `wanted`. Nothing is changed.

    Raises:
        DataFileError: results that belong to another batch, and `redo` was not given.
    """
    identities, places = Identities(), dict[str, tuple[int, bool]]()
    replaced: set[int] = set()
    strangers: list[str] = []
    for place, row in enumerate(rows):
        is_error = "error" in row
        identity = identities.name(row, row["key"], is_error=is_error)
        if row["key"] == wanted.get(identity) and not (is_error and retry_errors):
            earlier = places.setdefault(identity, (place, is_error))
            if earlier[0] != place:  # a row done again: a result counts more than an error, and the first result most
                replaced.add(earlier[0] if earlier[1] else place)
                places[identity] = (place, is_error) if earlier[1] else earlier
            continue
        replaced.add(place)
        if not is_error:
            strangers.append(_strangeness(row, identity, wanted))
    if strangers and not redo:
        raise DataFileError(
            f"{output}: {len(strangers)} of its rows do not belong to this batch, for example {strangers[0]}",
            hint="Name another output with -o, or drop and redo those rows with --redo.",
        )
    return Resumed({identity: is_error for identity, (_, is_error) in places.items()}, frozenset(replaced))


def _strangeness(row: Mapping[str, Any], identity: str, wanted: Mapping[str, str]) -> str:
    name = f"id {row['id']!r}" if "id" in row else f"the result of line {row.get('line')}"
    if identity not in wanted:
        return f"{name}, which is not in the input" + ("" if "id" in row else " or was edited")
    if said_of(row["key"]) != said_of(wanted[identity]):
        return f"{name}, whose row was edited"
    return f"{name}, which another base, another content of adapter {row['adapter']} or other settings answered"
