"""Fine-tuning with PEFT on TRL's trainer: a data file and a base become an adapter folder with its contract.

Importing this package is cheap: torch, transformers, peft and trl (the extra `train`) are loaded by `train` when it runs.
"""

from __future__ import annotations

from edgelora.train.methods import METHODS, Method
from edgelora.train.progress import TrainProgress, TrainReport, TrainStatus
from edgelora.train.recipe import Recipe
from edgelora.train.run import train

__all__ = ["METHODS", "Method", "Recipe", "TrainProgress", "TrainReport", "TrainStatus", "train"]
