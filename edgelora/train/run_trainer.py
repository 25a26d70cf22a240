"""What every run adds to TRL's trainers: whole checkpoints, the best one kept, a stop at a loss that is no number.

The loop, the loss, the optimizer and resuming are TRL's and transformers'.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerState

from edgelora.errors import EdgeloraError
from edgelora.train import ranks
from edgelora.train.folder import RunFolder, writing
from edgelora.train.saving import save_weights

ROW = "row"
"""The column with each row's place in the data, which a batch takes along to the loss."""
ROWS_NAMED = 8


class RunTrainer(Trainer):  # type: ignore[misc]
    """Beside one of TRL's trainers: `class Trainer(RunTrainer, SFTTrainer)`.

    Attributes:
        run: where checkpoints go.
        sources: `FILE:LINE` of every training row.
        step_loss: of the optimizer step so far.
    """

    def __init__(self, run: RunFolder, sources: Sequence[str], lora_plus_ratio: float | None, **options: Any) -> None:
        self.run, self.sources = run, sources
        self.step_loss = 0.0
        self._lora_plus_ratio = lora_plus_ratio
        self._rows: list[int] = []
        self._rows_of_step: list[int] = []
        self._checkpoint_goes_to: Path | None = None
        super().__init__(**options)

    def restore(self, checkpoint: Path) -> None:
        """Take weights and history from a checkpoint after the last step: there is nothing to train."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))

    def restore_best(self) -> int | None:
        """Take the weights that had the lowest loss on the evaluation data; the step, None where that was no number."""
        step = self.state.best_global_step
        if not step:
            return None
        self._load_from_checkpoint(str(self.run.checkpoint(step)))
        return int(step)

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        if self._lora_plus_ratio is not None:
            from peft.optimizers import create_loraplus_optimizer

            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            settings |= {
                "loraplus_lr_ratio": self._lora_plus_ratio,
                "loraplus_weight_decay": self.args.weight_decay,
            }
            self.optimizer: Any = create_loraplus_optimizer(self.model, kind, **settings)
        return super().create_optimizer(*args, **options)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        rows = inputs.pop(ROW, None)
        self._rows = [] if rows is None else rows.tolist()
        return super().compute_loss(model, inputs, *args, **options)

    def training_step(self, *args: Any, **options: Any) -> Any:
        loss = super().training_step(*args, **options)
        value = float(loss)
        if not math.isfinite(value):
            raise self._no_number("loss", value, self._rows)
        self.step_loss += value
        self._rows_of_step += self._rows
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """A gradient that is no number would spoil the weights, and be seen in the loss of the next rows only."""
        norm = super()._clip_grad_norm(model)
        rows, self._rows_of_step = self._rows_of_step, []
        is_scaled = self.accelerator.scaler is not None  # in float16, where a step that overflows is left out
        if norm is not None and not is_scaled and not math.isfinite(value := float(norm)):
            raise self._no_number("norm of the gradient", value, rows)
        return norm

    def _no_number(self, what: str, value: float, rows: Sequence[int]) -> EdgeloraError:
        return EdgeloraError(
            f"the {what} became {value} at step {self.state.global_step + 1} of {self.state.max_steps}, "
            f"on {self._named(rows)}",
            hint="Lower --learning-rate (a tenth is a start), or look for what is odd in these rows.",
        )

    def _named(self, rows: Sequence[int]) -> str:
        names = list(dict.fromkeys(self.sources[row] for row in rows))
        return ", ".join(names[:ROWS_NAMED]) + (f" and {len(names) - ROWS_NAMED} more" if names[ROWS_NAMED:] else "")

    def evaluate(self, *args: Any, **options: Any) -> Any:
        with torch.random.fork_rng():  # data loaders draw from it: watching a run must not change it
            return super().evaluate(*args, **options)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns: Any = [*columns, *({ROW} - set(columns))]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_goes_to or self.run.checkpoints)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        partial = self.run.checkpoints / f".partial-{step}"
        with writing(self.run.path):
            partial.mkdir(parents=True, exist_ok=ranks.world_size() > 1)
            self._checkpoint_goes_to = partial
            try:
                super()._save_checkpoint(model, trial)  # by all processes: each has a random state of its own
                ranks.wait_for_all()
                if ranks.is_first():
                    self.run.keep_checkpoint(partial / f"checkpoint-{step}", step, best=self.state.best_global_step)
            except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
                raise EdgeloraError(f"the checkpoint of step {step} cannot be written: {error}") from error
            finally:
                self._checkpoint_goes_to = None
                if ranks.is_first():
                    shutil.rmtree(partial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The trained weights alone: base, tokenizer and settings are known, and pickles are not needed."""
        save_weights(self.model, Path(output_dir or self.args.output_dir), state_dict)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """No README of placeholders in each checkpoint."""

    def _send_telemetry(self) -> None:
        """Nothing about a user's run leaves the machine."""


class NumberedCollator:
    """Another collator, whose batches also tell which rows they are made of."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = dict(self._collator([{k: v for k, v in example.items() if k != ROW} for example in examples]))
        return {**batch, ROW: torch.tensor([example[ROW] for example in examples])}


def stopped_early(state: Mapping[str, Any], patience: int | None) -> bool:
    """Whether the loss on the evaluation data was not lower for so many evaluations.

    Args:
        state: of the trainer: `log_history`, and `best_global_step` where there was one.
    """
    best = state.get("best_global_step")
    if patience is None or not best:
        return False
    later = [line for line in state["log_history"] if "eval_loss" in line and line["step"] > best]
    return len(later) >= patience
