"""What a run learns from: one row each. `home` has the reader, the tokenization and TRL's trainer of it.

Only the standard library is needed to read the table (`--help` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
        name: what `--objective` takes.
        defaults: the settings of a recipe that it alone reads, and what they are where none is given.
        unread: settings of methods that it does not read.
        learning_rate: of it, as a share of the method's own.
        home: the module with `read`, `tokenize` and `Trainer` (`edgelora.train.sft`).
        packs: whether its rows can be packed (`edgelora.train.packing`).
        sequences: that the model reads of each row.
    """

    name: str
    summary: str
    home: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    learning_rate: float = 1.0
    packs: bool = False
    sequences: int = 1


ROWS = (
    Objective("sft", "replies of the assistant, token by token", "edgelora.train.sft", packs=True),
    Objective(
        # Rafailov et al. train all weights at 1e-6 (appendix B): a twentieth of what supervised tuning takes.
        "dpo",
        "pairs of a chosen and a rejected reply (arXiv:2305.18290)",
        "edgelora.train.dpo",
        {"dpo_beta": 0.1, "dpo_loss": "sigmoid", "dpo_label_smoothing": 0.0},
        unread=("dropout",),
        sequences=2,
        learning_rate=0.05,
    ),
)
OBJECTIVES: Mapping[str, Objective] = {objective.name: objective for objective in ROWS}
