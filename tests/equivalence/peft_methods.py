"""PEFT adapters of any method with random, non-zero weights, and what each of their layers computes.

A `Case` is one configuration of one method. What a layer computes is asked of PEFT's own forward pass, with the
identity matrix as its input: that is the weight it stands for, whatever its `merge` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Randomize = Callable[[str, torch.nn.Parameter], None]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def normal(name: str, parameter: torch.nn.Parameter) -> None:
    """Every value random, with a standard deviation of 0.1."""
    torch.nn.init.normal_(parameter, std=0.1)


def near(value: float, std: float = 0.2) -> Randomize:
    """Every value random around `value`: for factors that multiply weights."""

    def randomize(name: str, parameter: torch.nn.Parameter) -> None:
        torch.nn.init.normal_(parameter, mean=value, std=std)

    return randomize


def nudged(std: float = 0.1) -> Randomize:
    """What PEFT's initialisation gives, and random values added."""

    def randomize(name: str, parameter: torch.nn.Parameter) -> None:
        parameter.data += torch.randn_like(parameter) * std

    return randomize


@dataclass(frozen=True)
class Case:
    """One adapter.

    Attributes:
        config: name of the configuration class in PEFT.
        settings: what it is made with; `target_modules` is all linear layers where they do not say.
        model: a row of `tiny_models.TINY`.
        randomize: gives every trainable parameter of the adapter its value.
        tolerance: relative error of a layer's change in float32; PEFT computes some in an order of its own.
    """

    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = "llama"
    randomize: Randomize = normal
    tolerance: float = 1e-4


def make_peft(case: Case, base: Path, folder: Path, seed: int = 1) -> Any:
    """Put the adapter on the model in `base`, save it to `folder`, and return PEFT's model in evaluation mode."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    config = getattr(peft, case.config)(**{"task_type": "CAUSAL_LM", "target_modules": list(LINEARS), **case.settings})
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            case.randomize(name, parameter)
    adapted.save_pretrained(folder)
    return adapted


def layers(adapted: Any) -> dict[str, Any]:
    """Module's name in transformers to PEFT's layer around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    prefix = "base_model.model."
    found = {name: module for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name.removeprefix(prefix): module for name, module in found.items() if ".base_layer" not in name}


def computed_weight(layer: Any) -> tuple[Floats, Floats]:
    """The weight (rows, columns) and the bias (rows,) that a linear layer computes with."""
    return plain_weight(layer, layer.in_features)


def base_weight(layer: Any) -> tuple[Floats, Floats]:
    """The same of the layer below."""
    return plain_weight(layer.get_base_layer(), layer.in_features)


def plain_weight(layer: Any, columns: int) -> tuple[Floats, Floats]:
    """The same of a layer that is none of PEFT's."""
    with torch.no_grad():
        zero = layer(torch.zeros(1, 1, columns))
        weight = (layer(torch.eye(columns)[None]) - zero)[0].T.contiguous().numpy()
    return weight, zero[0, 0].numpy()
