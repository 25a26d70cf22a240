"""The trainer of a run, set up from its recipe and fed with token rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from transformers.pytorch_utils import Conv1D
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from edgelora.errors import SettingsError
from edgelora.train.base import Base, Placement
from edgelora.train.data import IGNORED
from edgelora.train.folder import RunFolder
from edgelora.train.methods import ALL_LINEAR
from edgelora.train.packing import collator_for, require_rows_apart
from edgelora.train.progress import TrainProgress
from edgelora.train.recipe import Recipe
from edgelora.train.rows import Rows
from edgelora.train.run_callback import RunCallback
from edgelora.train.run_trainer import ROW, NumberedCollator, RunTrainer
from edgelora.train.trainee import Trainee

TOKENS_PER_DIRECTION = 32
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def build_trainer(
    trainee: Trainee,
    tokenizer: Any,
    rows: Rows,
    eval_rows: Rows | None,
    recipe: Recipe,
    place: Placement,
    run: RunFolder,
    progress: TrainProgress,
    base: Base | None = None,
) -> tuple[RunTrainer, RunCallback]:
    """The trainer of a run and the callback that knows how it went.

    Args:
        base: what preferences are measured against, where all of its weights are trained.
    """
    home = import_module(recipe.objective_row.home)
    padding = padding_of(tokenizer)
    collator = collator_for(trainee.model, padding) if recipe.packing else home.collator(padding)
    callback = RunCallback(run, recipe, progress)
    config = home.config(recipe, **_settings(recipe, place, run, evaluate=eval_rows is not None))
    if config.n_gpu > 1:
        config._n_gpu = 1  # several GPUs in one process are beyond TRL; accelerate or torchrun starts one for each
    trainer: RunTrainer = home.Trainer(
        run,
        rows.sources,
        recipe.lora_plus_ratio,
        model=trainee.model,
        args=config,
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
        data_collator=NumberedCollator(collator),
        callbacks=[callback],
        **(home.reference(base, recipe, place) if base else {}),
    )
    if place.quantization and place.dtype_name == "float32":
        keep_float32(trainer.model)
    if recipe.packing:
        require_rows_apart(trainer.model, rows.token_rows(), collator)
    trainer.remove_callback(PrinterCallback)
    callback.trainer = trainer
    return trainer, callback


def keep_float32(model: Any) -> None:
    """TRL trains adapters of a quantized base in bfloat16, as QLoRA's paper does on GPUs, whatever computes here."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def padding_of(tokenizer: Any) -> int:
    return int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))


def _dataset(rows: Rows) -> Dataset:
    return Dataset.from_dict({**rows.columns(), ROW: list(range(len(rows.rows)))})


def batches(rows: Rows, tokenizer: Any, recipe: Recipe, device: str) -> Iterator[Mapping[str, Any]]:
    """The training rows in their order, as EVA reads them: many trained tokens for each direction that it looks for,
    so that its directions soon settle."""
    collator = DataCollatorForLanguageModeling(pad_token_id=padding_of(tokenizer))
    directions = round((recipe.rank or 1) * (recipe.eva_rho or 1))
    batch: list[dict[str, Any]] = []
    trained = 0
    for row in rows.token_rows():
        batch.append({"input_ids": row.input_ids, "labels": row.labels})
        trained += sum(label != IGNORED for label in row.labels)
        if trained >= TOKENS_PER_DIRECTION * directions:
            yield {name: values.to(device) for name, values in collator(batch).items()}
            batch, trained = [], 0
    if trained >= directions:
        yield {name: values.to(device) for name, values in collator(batch).items()}


def rank_notes(model: Any, recipe: Recipe) -> list[str]:
    """A note where the rank is above the smaller side of an adapted matrix, whose update cannot have so much."""
    if recipe.rank is None:
        return []
    sides = {name: min(m.in_features, m.out_features) for name, m in model.named_modules() if hasattr(m, "lora_A")}
    above = {name.rpartition(".")[2]: side for name, side in sides.items() if side < recipe.rank}
    if not above:
        return []
    smallest = min(above, key=lambda name: above[name])
    return [
        f"rank {recipe.rank} is more than {', '.join(sorted(above))} can hold ({smallest}: {above[smallest]}); "
        "the rest costs space and changes nothing"
    ]


def _settings(recipe: Recipe, place: Placement, run: RunFolder, *, evaluate: bool) -> dict[str, Any]:
    """What transformers' TrainingArguments take, whatever the objective."""
    reports = [name.strip() for name in (recipe.report_to or "").split(",") if name]
    return {
        "output_dir": str(run.checkpoints),
        "run_name": run.path.name,
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.max_steps or -1,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": SCHEDULES[recipe.scheduler],
        "warmup_steps": recipe.warmup_ratio,  # below 1, it is a share of the steps
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "activation_checkpointing": recipe.gradient_checkpointing,  # its new name
        "use_liger_kernel": recipe.liger,
        "seed": recipe.seed,
        "bf16": place.device == "cuda" and place.dtype_name == "bfloat16",
        "use_cpu": place.device == "cpu",
        "dataloader_pin_memory": place.device == "cuda",
        "logging_steps": recipe.logging_steps,
        "logging_nan_inf_filter": False,  # it would replace a NaN by the mean so far
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": (recipe.eval_steps or recipe.save_steps) if evaluate else None,
        "report_to": reports or "none",
        "disable_tqdm": True,
    }


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
