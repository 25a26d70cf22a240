"""Fine-tuning with PEFT on TRL's trainer: a data file and a base become an adapter folder with its contract.

The names below are imported on first use: `--help` reads `Recipe`, and torch, transformers, peft and trl (the extra
`train`) are loaded by `train` when it runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgelora.train.certificate import certify
    from edgelora.train.methods import METHODS, Method
    from edgelora.train.progress import TrainProgress, TrainReport, TrainStatus
    from edgelora.train.recipe import Recipe
    from edgelora.train.run import train

_HOMES = {
    "METHODS": "methods",
    "Method": "methods",
    "Recipe": "recipe",
    "TrainProgress": "progress",
    "TrainReport": "progress",
    "TrainStatus": "progress",
    "certify": "certificate",
    "train": "run",
}

__all__ = ["METHODS", "Method", "Recipe", "TrainProgress", "TrainReport", "TrainStatus", "certify", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgelora.train' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"edgelora.train.{_HOMES[name]}"), name)
    return value
