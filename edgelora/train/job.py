"""A run's parts as they are handed on: what to train, on what and where to; then the rows as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgelora.contract import Contract
from edgelora.train.base import Base
from edgelora.train.folder import RunFolder
from edgelora.train.progress import TrainProgress, TrainStatus
from edgelora.train.recipe import Recipe

if TYPE_CHECKING:
    from edgelora.train.rows import Data, Rows


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where to.

    Attributes:
        data: how the recipe's objective reads its data; `examples` and `eval_examples` are what it read.
    """

    data: Data
    examples: Sequence[Any]
    eval_examples: Sequence[Any]
    base: Base
    recipe: Recipe
    run: RunFolder


@dataclass(frozen=True)
class Prepared:
    """A job's rows as tokens, and the contract they will be served under.

    Attributes:
        found: arguments of the PEFT config that follow from base and template.
    """

    tokenizer: Any
    rows: Rows
    eval_rows: Rows | None
    contract: Contract
    found: Mapping[str, Any] = field(default_factory=dict)


class Notes:
    """Passes progress on and keeps the notes for the report."""

    def __init__(self, progress: TrainProgress) -> None:
        self.progress = progress
        self.kept: list[str] = []

    def note(self, text: str) -> None:
        self.progress.note(text)

    def keep(self, text: str) -> None:
        self.kept.append(text)
        self.progress.note(text)

    def update(self, status: TrainStatus) -> None:
        self.progress.update(status)
