"""Answers side by side: what `/compare` shows."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from itertools import zip_longest

MIN_WIDTH = 24
GAP = "  "


def side_by_side(answers: Mapping[str, str], width: int) -> Iterator[str]:
    """Lines of `answers` (name to text), a column each; one under the other where `width` has no room for columns."""
    each = (width + len(GAP)) // max(1, len(answers)) - len(GAP)
    if each < MIN_WIDTH or len(answers) < 2:
        yield from (f"[{name}] {text}" for name, text in answers.items())
        return
    columns = [_column(name, text, each) for name, text in answers.items()]
    for row in zip_longest(*columns, fillvalue=""):
        yield GAP.join(f"{cell:{each}}" for cell in row).rstrip()


def _column(name: str, text: str, width: int) -> list[str]:
    lines = [f"[{name}]"[:width]]
    for line in text.splitlines():
        lines += textwrap.wrap(line, width, replace_whitespace=False, drop_whitespace=True) or [""]
    return lines
