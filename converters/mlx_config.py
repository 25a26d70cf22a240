"""The configuration of an adapter that mlx-lm trained on a Mac.

    {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}, "num_layers": 16,
     "model": "mlx-community/Qwen3-0.6B-4bit", "iters": 1000, and every other option of the training run}

What this relies on: `scale` counts as it stands, alpha and rank do not enter it (mlx_lm/tuner/utils.py and lora.py in
https://github.com/ml-explore/mlx-lm). Releases of spring 2024 multiplied it by alpha / rank
(https://github.com/ml-explore/mlx-examples/pull/623): an adapter that may be of that time is refused where this makes a
difference. `fine_tune_type` was `use_dora` before October 2024, and `num_layers` was `lora_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint import read_json
from converters.errors import ConversionError

CONFIG = "adapter_config.json"
METHODS = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}
MAX_SHOWN = 40
MAX_SCALE = 1e30  # beyond, float32 could not hold the change
LORA_SETTINGS = frozenset(("rank", "scale", "alpha", "dropout", "keys"))
# Options of a training run, which do not say what the tensors mean.
OPTIONS = frozenset((
    "adapter_path", "batch_size", "beta", "clear_cache_threshold", "config", "data", "grad_accumulation_steps",
    "grad_checkpoint", "hf_dataset", "iters", "learning_rate", "lora_layers", "lr_schedule", "mask_prompt",
    "max_seq_length", "num_layers", "optimizer", "optimizer_config", "project_name", "prompt_feature", "report_to",
    "completion_feature", "resume_adapter_file", "save_every", "seed", "steps_per_eval", "steps_per_report", "test",
    "test_batches", "train", "trust_remote_code", "val_batches", "wandb",
))  # fmt: skip
USED = frozenset(("fine_tune_type", "lora_parameters", "model", "use_dora"))


@dataclass(frozen=True)
class MlxSettings:
    """What the configuration says of the tensors.

    Attributes:
        method: a key of `METHODS`, or what else stands there.
        rank: 0 where it is not told: full fine-tuning, or a problem.
        base_model: what was trained, as it was named there; "" where that is not told.
        notices: settings that nobody here knows: new options of a run mostly change nothing.
    """

    method: str
    rank: int
    scale: float
    base_model: str
    problems: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def detect_mlx(folder: Path) -> bool:
    """Whether mlx-lm saved this folder; its weights may be missing."""
    try:
        config = read_json(folder / CONFIG)
    except ConversionError:
        return False
    return "peft_type" not in config and bool({"fine_tune_type", "lora_parameters", "lora_layers"} & set(config))


def read_mlx_settings(folder: Path) -> MlxSettings:
    """Raises MissingFileError or FormatError where there is no configuration; all else is among its problems."""
    config = read_json(folder / CONFIG)
    problems: list[str] = []
    method = _method(config, problems)
    rank, scale = (0, 1.0) if method == "full" else _lora_settings(config, problems)
    model = config.get("model")
    unknown = ", ".join(sorted(set(config) - OPTIONS - USED))
    return MlxSettings(
        method=method,
        rank=rank,
        scale=scale,
        base_model=model if isinstance(model, str) else "",
        problems=tuple(f"{CONFIG}: {problem}" for problem in problems),
        notices=(f"{CONFIG}: unknown settings, taken for options of the training run: {unknown}",) if unknown else (),
    )


def _method(config: Mapping[str, Any], problems: list[str]) -> str:
    default = "dora" if config.get("use_dora") is True else "lora"
    method = config.get("fine_tune_type", default)
    if not isinstance(method, str) or method not in METHODS:
        problems.append(f"fine_tune_type is {method!r:.{MAX_SHOWN}}, known are {', '.join(METHODS)}")
    return str(method)


def _lora_settings(config: Mapping[str, Any], problems: list[str]) -> tuple[int, float]:
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict):
        problems.append("has no lora_parameters")
        return 0, 1.0
    if unknown := sorted(set(settings) - LORA_SETTINGS):
        problems.append(f"unknown in lora_parameters: {', '.join(unknown)}")
    rank, scale = settings.get("rank"), settings.get("scale")
    if type(rank) is not int or rank < 1:
        problems.append(f"lora_parameters.rank is {rank!r:.{MAX_SHOWN}}, and must be a number of 1 or more")
        rank = 0
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not abs(scale) <= MAX_SCALE:  # or NaN
        problems.append(f"lora_parameters.scale is {scale!r:.{MAX_SHOWN}}, and must be what B @ A is multiplied by")
        scale = 1.0
    if _alpha_may_count(config, settings.get("alpha"), rank):
        problems.append(
            f"lora_parameters.alpha is {settings['alpha']!r:.{MAX_SHOWN}}: releases of spring 2024 multiplied scale by "
            "alpha / rank, later ones ignore alpha; take alpha out, after multiplying scale where it was such a release"
        )
    return rank, float(scale)


def _alpha_may_count(config: Mapping[str, Any], alpha: Any, rank: int) -> bool:
    is_old = "num_layers" not in config and "fine_tune_type" not in config
    return is_old and alpha is not None and alpha != rank
