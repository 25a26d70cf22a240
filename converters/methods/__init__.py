"""How each PEFT method's tensors become low-rank factors, by the name in `adapter_config.json`.

To add a method: one file beside this one with a `read` like `lora.read`, and its row in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from converters.checkpoint import Tensors
from converters.methods import lora
from converters.methods.factors import Factors
from converters.peft_config import PeftConfig

__all__ = ["METHODS", "Factors"]

METHODS: Mapping[str, Callable[[PeftConfig, Tensors], tuple[list[Factors], list[str]]]] = {"LORA": lora.read}
