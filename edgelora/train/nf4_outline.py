"""Layers in NF4 for an outline: they take what bitsandbytes' own take, packed and unpacked, and hold no values."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit

BLOCK, ABSMAX_BLOCK = 64, 256
"""Weights to a scale of one byte, and scales to a float32 of theirs (QLoRA, section 3; bitsandbytes' defaults)."""


def quantize(model: Any) -> None:
    """All linear layers that transformers would quantize: not the output layer, nor what is tied to it."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = tuple(get_keys_to_not_convert(model))
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and not name.startswith(kept):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, NF4Linear(module))
    model.is_loaded_in_4bit = True


class NF4Linear(Linear4bit):
    """A layer that takes the memory of bitsandbytes' own: packed weights, unpacked for each product."""

    def __init__(self, layer: Any) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.compute_dtype = self.dtype = layer.weight.dtype
        self.stands_for = layer.weight.numel()
        scales = -(-self.stands_for // BLOCK)
        self.packed = torch.nn.Buffer(torch.empty(-(-self.stands_for // 2), dtype=torch.uint8))
        self.scales = torch.nn.Buffer(torch.empty(scales, dtype=torch.uint8))
        self.scales_of_scales = torch.nn.Buffer(torch.empty(-(-scales // ABSMAX_BLOCK), dtype=torch.float32))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # what PEFT asks of it, and DoRA unpacks
        shape = (self.out_features, self.in_features)
        unpacked = torch.empty(shape, dtype=self.dtype, device=self.packed.device)
        unpacked.compress_statistics, unpacked.quant_type = True, "nf4"
        return unpacked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _UnpackedProduct.apply(x.to(self.compute_dtype), self)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class _UnpackedProduct(torch.autograd.Function):  # type: ignore[misc]
    """x @ weight.T with a weight that is there only while it is needed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: NF4Linear) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ ctx.layer.weight.to(gradient.dtype), None
