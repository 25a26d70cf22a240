"""A model as its configuration gives it, adapter and all, without one value of its weights: for planning.

It is built on torch's meta device and moved to fake tensors, which say that they are on the device of the run but take
no memory: a 7B is outlined in seconds on a laptop. Modules, types and shapes are those of a run: transformers' classes,
PEFT's adapters, and layers that take what bitsandbytes' NF4 layers take.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from trl.trainer.utils import add_fused_lm_head

from edgelora.train.base import Base, Placement
from edgelora.train.recipe import Recipe
from edgelora.train.trainee import _adapted as put_on

METRICS = ("log_probs", "entropy", "is_top1")  # what TRL's trainer asks of the loss


@dataclass(frozen=True)
class Outline:
    """A model to reckon with.

    Attributes:
        model: of fake tensors, in training mode.
        fake: the mode they belong to: what computes with them runs inside.
        weights: bytes of all parameters and buffers, an adapter's included.
        trained, total: parameters; a quantized weight counts as what it stands for.
        vocabulary: tokens that logits are computed of.
        trained_bytes: of those that are trained, as they are stored.
        autocast: what linear layers compute in, where that is not the type of their weights.
    """

    model: Any
    fake: FakeTensorMode
    weights: int
    trained: int
    total: int
    trained_bytes: int
    vocabulary: int
    device: str
    autocast: torch.dtype | None


def outline(base: Base, recipe: Recipe, place: Placement, found: Mapping[str, Any]) -> Outline:
    """What a run of `recipe` would train.

    Args:
        found: arguments of the PEFT config that follow from the base; see `Method.peft_config`.

    Raises:
        ModelFileError: the base's configuration cannot be read.
        SettingsError: PEFT has no such adapter for this base.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of values that are not copied, which is what is wanted
        model = _model(base.load_config(), place)
        if place.quantization:
            from edgelora.train.nf4_outline import quantize

            quantize(model)
        add_fused_lm_head(model, outputs=METRICS)
        if not recipe.row.trains_base:
            model = put_on(model, _plainly_begun(recipe.row.peft_config(recipe, **found)), recipe)
    fake = FakeTensorMode()
    _move(model, fake, "cpu")  # also for GPUs, whose own kernels look at values; see `step_memory`
    parameters, stored = list(model.parameters()), [*model.parameters(), *model.buffers()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    packed = sum(getattr(module, "stands_for", 0) for module in model.modules())
    return Outline(
        model=model.train(),
        fake=fake,
        weights=_bytes(stored),
        trained=sum(parameter.numel() for parameter in trained),
        total=sum(parameter.numel() for parameter in parameters) + packed,
        trained_bytes=_bytes(trained),
        vocabulary=int(model.config.get_text_config().vocab_size),
        device=place.device,
        autocast=place.dtype if place.device == "cuda" and place.dtype_name == "bfloat16" else None,
    )


def _model(config: Any, place: Placement) -> Any:
    from transformers import AutoModelForCausalLM

    attention = {"attn_implementation": place.attention} if place.attention else {}
    return AutoModelForCausalLM.from_config(config, dtype=place.dtype, **attention)


def _plainly_begun(config: Any) -> Any:
    """Initialisations that read the base find no values here, and leave the same shapes as the plain one."""
    if getattr(config, "init_lora_weights", None) is not None:
        config.init_lora_weights = True
    return config


def _move(model: Any, fake: FakeTensorMode, device: str) -> None:
    """Put fake tensors in the place of those on the meta device; tied weights stay tied."""
    made: dict[int, Any] = {}

    def faked(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            made[id(tensor)] = FakeTensor(fake, tensor.detach().to("meta"), torch.device(device))
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(faked(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = faked(buffer)


def _bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
