"""How long training rows are, which decides how much memory and time a run takes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from edgelora.train.rows import Rows


def lengths(rows: Rows) -> list[int]:
    """Tokens of each row; of a pair, of its longer side."""
    columns = rows.columns()
    if "input_ids" in columns:
        return [len(ids) for ids in columns["input_ids"]]
    sides = zip(columns["prompt_ids"], columns["chosen_ids"], columns["rejected_ids"], strict=True)
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in sides]


def longest(rows: Rows, count: int, *, repeated: int = 1) -> tuple[Any, int]:
    """The longest `count` rows, so many times over, and the tokens of the longest."""
    found = lengths(rows)
    order = sorted(range(len(found)), key=lambda index: -found[index])
    chosen = [rows.rows[order[index % len(order)]] for index in range(count)]
    return replace(rows, rows=chosen * repeated), found[order[0]]  # type: ignore[type-var]


def padded_tokens(found: list[int], batch_size: int, seed: int) -> int:
    """Tokens of one pass through the data in shuffled batches, each as wide as its longest row."""
    shuffled = random.Random(seed).sample(found, len(found))
    batches = [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]
    return sum(len(batch) * max(batch) for batch in batches)
