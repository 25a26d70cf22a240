"""Supervised fine-tuning: replies of the assistant, token by token, with TRL's SFTTrainer.

Rows come tokenized and labelled: TRL 1.16 takes a `labels` column as it is (`SFTTrainer._prepare_dataset`), with the
preparation skipped.
"""

from __future__ import annotations

from typing import Any

from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from edgelora.train.base import Base, Placement
from edgelora.train.recipe import Recipe
from edgelora.train.run_trainer import RunTrainer


class Trainer(RunTrainer, SFTTrainer):  # type: ignore[misc]
    """See `RunTrainer`."""


def config(recipe: Recipe, **shared: Any) -> SFTConfig:
    return SFTConfig(**shared, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})


def collator(padding: int) -> Any:
    return DataCollatorForLanguageModeling(pad_token_id=padding)


def reference(base: Base, recipe: Recipe, place: Placement) -> dict[str, Any]:
    """More arguments of the trainer: none."""
    return {}
