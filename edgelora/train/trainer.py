"""TRL's SFT trainer, set up from a recipe and fed with token rows; checkpoints whole, progress and interrupts ours.

The loop, the loss, the optimizer and resuming are TRL's and transformers'. Rows come tokenized and labelled: TRL 1.16
takes a `labels` column as it is (`SFTTrainer._prepare_dataset`), with the preparation skipped.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.pytorch_utils import Conv1D
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from edgelora.errors import EdgeloraError, SettingsError
from edgelora.train.base import Placement
from edgelora.train.data import TokenRows
from edgelora.train.folder import RunFolder, writing
from edgelora.train.methods import method_named
from edgelora.train.progress import TrainProgress, TrainStatus
from edgelora.train.recipe import ALL_LINEAR, Recipe

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
# metrics.jsonl's names for what TRL logs.
METRICS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "mean_token_accuracy": "token_accuracy",
    "entropy": "entropy",
    "eval_loss": "eval_loss",
    "eval_mean_token_accuracy": "eval_token_accuracy",
}


class AdapterTrainer(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` that saves whole checkpoints, stops at a loss that is no number, and keeps to this machine."""

    def __init__(self, run: RunFolder, **options: Any) -> None:
        self.run = run
        self.step_loss = 0.0
        self._checkpoint_goes_to: Path | None = None
        super().__init__(**options)

    def restore(self, checkpoint: Path) -> None:
        """Take weights and history from a checkpoint after the last step: there is nothing to train."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))

    def training_step(self, *args: Any, **options: Any) -> Any:
        loss = super().training_step(*args, **options)
        value = float(loss)
        if not math.isfinite(value):
            raise EdgeloraError(
                f"the loss became {value} at step {self.state.global_step + 1} of {self.state.max_steps}",
                hint="Lower --learning-rate (a tenth is a start), or look for odd rows.",
            )
        self.step_loss += value
        return loss

    def evaluate(self, *args: Any, **options: Any) -> Any:
        with torch.random.fork_rng():  # data loaders draw from it: watching a run must not change it
            return super().evaluate(*args, **options)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_goes_to or self.run.checkpoints)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        partial = self.run.checkpoints / f".partial-{step}"
        with writing(self.run.path):
            partial.mkdir(parents=True)
            self._checkpoint_goes_to = partial
            try:
                super()._save_checkpoint(model, trial)
                self.run.keep_checkpoint(partial / f"checkpoint-{step}", step)
            except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
                raise EdgeloraError(f"the checkpoint of step {step} cannot be written: {error}") from error
            finally:
                self._checkpoint_goes_to = None
                shutil.rmtree(partial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone: base, tokenizer and settings are known, and pickles are not needed."""
        save_peft(self.model, Path(output_dir or self.args.output_dir))

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """No README of placeholders in each checkpoint."""

    def _send_telemetry(self) -> None:
        """Nothing about a user's run leaves the machine."""


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Reports each step, writes metrics.jsonl, and turns Ctrl-C into a checkpoint and a stop."""

    def __init__(self, run: RunFolder, progress: TrainProgress) -> None:
        self.run = run
        self.progress = progress
        self.trainer: AdapterTrainer | None = None
        self.interrupted = False
        self.eval_loss: float | None = None
        self.steps_per_second = 0.0
        self._began, self._first_step, self._learning_rate = 0.0, 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began, self._first_step = time.monotonic(), state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self._learning_rate = options["lr_scheduler"].get_last_lr()[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step - self._first_step
        self.steps_per_second = done / max(time.monotonic() - self._began, 1e-9)
        if self.trainer is not None:
            self.progress.update(self._status(state, self.trainer.step_loss))
            self.trainer.step_loss = 0.0
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif self.interrupted:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        found = {METRICS[name]: value for name, value in (logs or {}).items() if name in METRICS}
        if not found:
            return  # the trainer's summary at the end
        self.eval_loss = found.get("eval_loss", self.eval_loss)
        seconds = time.monotonic() - self._began
        when = {"step": state.global_step, "epoch": round(state.epoch, 4)}
        speed = {"seconds": round(seconds, 3), "steps_per_second": round(self.steps_per_second, 4)}
        self.run.log_metrics({**when, **found, **speed})

    def _status(self, state: Any, loss: float) -> TrainStatus:
        return TrainStatus(
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch,
            loss=loss,
            learning_rate=self._learning_rate,
            steps_per_second=self.steps_per_second,
            seconds_left=(state.max_steps - state.global_step) / self.steps_per_second,
            eval_loss=self.eval_loss,
        )

    @contextmanager
    def catching_interrupts(self) -> Iterator[None]:
        """The first Ctrl-C asks for a stop after the step; the second is an ordinary KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def interrupt(_signal: int, _frame: FrameType | None) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)
            self.progress.note("Ctrl-C: stopping after this step (again: at once)")

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def save_peft(model: Any, folder: Path) -> None:
    """What PEFT writes for a trained model, without its model card of placeholders.

    Embeddings are left out: they are only needed where the vocabulary was enlarged, which does not happen here, and
    PEFT's "auto" would ask the hub about it.
    """
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def build_trainer(
    model: Any,
    tokenizer: Any,
    rows: TokenRows,
    eval_rows: TokenRows | None,
    recipe: Recipe,
    place: Placement,
    run: RunFolder,
    progress: TrainProgress,
) -> tuple[AdapterTrainer, RunCallback]:
    """The trainer of a run and the callback that knows how it went.

    Raises:
        SettingsError: target modules that the base does not have.
    """
    check_target_modules(model, recipe)
    padding = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    callback = RunCallback(run, progress)
    trainer = AdapterTrainer(
        run,
        model=model,
        args=_config(recipe, place, run, evaluate=eval_rows is not None),
        train_dataset=Dataset.from_dict(rows.columns()),
        eval_dataset=Dataset.from_dict(eval_rows.columns()) if eval_rows else None,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=padding),
        peft_config=method_named(recipe.method).peft_config(recipe),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    callback.trainer = trainer
    return trainer, callback


def rank_notes(model: Any, recipe: Recipe) -> list[str]:
    """A note where the rank is above the smaller side of an adapted matrix, whose update cannot have so much."""
    sides = {name: min(m.in_features, m.out_features) for name, m in model.named_modules() if hasattr(m, "lora_A")}
    above = {name.rpartition(".")[2]: side for name, side in sides.items() if side < recipe.rank}
    if not above:
        return []
    smallest = min(above, key=lambda name: above[name])
    return [
        f"rank {recipe.rank} is more than {', '.join(sorted(above))} can hold ({smallest}: {above[smallest]}); "
        "the rest costs space and changes nothing"
    ]


def _config(recipe: Recipe, place: Placement, run: RunFolder, *, evaluate: bool) -> SFTConfig:
    config = SFTConfig(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=SCHEDULES[recipe.scheduler],
        warmup_steps=recipe.warmup_ratio,  # below 1, it is a share of the steps
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        activation_checkpointing=recipe.gradient_checkpointing,  # its new name
        seed=recipe.seed,
        bf16=place.dtype_name == "bfloat16",
        use_cpu=place.device == "cpu",
        dataloader_pin_memory=place.device == "cuda",
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # it would replace a NaN by the mean so far
        save_strategy="steps",
        save_steps=recipe.save_steps,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=(recipe.eval_steps or recipe.save_steps) if evaluate else None,
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if config.n_gpu > 1:
        config._n_gpu = 1  # several GPUs in one process are beyond TRL; accelerate or torchrun starts one for each
    return config


def check_target_modules(model: Any, recipe: Recipe) -> None:
    """Each name must be a linear layer's: PEFT is content if only one of them is.

    Raises:
        SettingsError: names that fit none, or the output layer, which TRL's fused loss does not go through.
    """
    wanted = recipe.target_module_names
    if wanted == ALL_LINEAR:
        return
    output = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not output]
    unknown = [name for name in wanted if not any(full == name or full.endswith(f".{name}") for full in linear)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise SettingsError(
            f"target modules that this base does not have: {', '.join(unknown)}",
            hint=f"Its linear layers: {', '.join(known)}; or all-linear.",
        )
