"""Rows that say the same: found by hashes of eight bytes, so that a million rows take eight megabytes a list."""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelora.messages import Conversation

Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def _hashes() -> array[int]:
    return array("Q")


@dataclass
class RowHashes:
    """Hashes of rows, in their order.

    Attributes:
        exact: of messages and tools as they are.
        folded: of the same without differences of case, of spaces, and of Unicode's ways to write one character.
        prompts: of what stands before the last reply, folded; 0 where nothing does.
    """

    exact: array[int] = field(default_factory=_hashes)
    folded: array[int] = field(default_factory=_hashes)
    prompts: array[int] = field(default_factory=_hashes)

    def add(self, conversations: Iterable[Conversation]) -> None:
        """Of one row: of a preference pair, both conversations."""
        rows = [(conversation.messages, conversation.tools) for conversation in conversations]
        whole, prompt = _as_text(rows), rows[0][0][:-1]
        self.exact.append(_digest(whole))
        self.folded.append(_digest(_folded(whole)))
        self.prompts.append(_digest(_folded(_as_text([prompt, rows[0][1]]))) if prompt else 0)

    def repeats(self) -> Repeats:
        exact, folded, prompts = (repeated(hashes) for hashes in (self.exact, self.folded, self.prompts))
        return Repeats(exact, np.setdiff1d(folded, exact), np.setdiff1d(prompts, folded))


@dataclass(frozen=True)
class Repeats:
    """Indices of rows that repeat an earlier one: exactly; but for case and spaces; in what is asked only."""

    exact: Indices
    folded: Indices
    asked: Indices


def repeated(hashes: array[int]) -> Indices:
    """Indices, ascending, of what occurred before; zeros are not looked at."""
    values = _values(hashes)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    again = (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)
    return np.sort(order[1:][again])


def first_of(hashes: array[int], index: int) -> int:
    """Index of the first row that has the hash of row `index`."""
    values = _values(hashes)
    return int(np.argmax(values == values[index]))


def shared(hashes: array[int], others: array[int]) -> Indices:
    """Indices, ascending, of what is among `others` too; zeros are not looked at."""
    values = _values(hashes)
    return np.flatnonzero(np.isin(values, _values(others)) & (values != 0))


def _values(hashes: array[int]) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _folded(text: str) -> str:
    spaced = text.replace("\\n", " ").replace("\\t", " ").replace("\\r", " ")  # as JSON writes them
    return " ".join(unicodedata.normalize("NFKC", spaced).casefold().replace('" ', '"').replace(' "', '"').split())


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
