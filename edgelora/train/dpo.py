"""Preference tuning (DPO, arXiv:2305.18290): pairs of a chosen and a rejected reply, with TRL's DPOTrainer.

Rows come tokenized as serving cuts the text, prompt and replies apart. What preferences are measured against is the
base: TRL keeps a frozen copy of the adapter as it began, and for all weights a second model.
"""

from __future__ import annotations

from typing import Any

from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from edgelora.train.base import Base, Placement
from edgelora.train.recipe import Recipe
from edgelora.train.run_trainer import RunTrainer


class Trainer(RunTrainer, DPOTrainer):  # type: ignore[misc]
    """See `RunTrainer`."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Rows are tokenized already."""
        return dataset


def config(recipe: Recipe, **shared: Any) -> DPOConfig:
    return DPOConfig(
        **shared,
        max_length=None,
        beta=recipe.dpo_beta,
        loss_type=[recipe.dpo_loss],
        label_smoothing=recipe.dpo_label_smoothing,
    )


def collator(padding: int) -> Any:
    return DataCollatorForPreference(pad_token_id=padding)


def reference(base: Base, recipe: Recipe, place: Placement) -> dict[str, Any]:
    """More arguments of the trainer: the base itself, where its weights are trained and nothing else keeps it."""
    return {"ref_model": base.load_model(place).to(place.device)} if recipe.row.trains_base else {}
