"""What llama.cpp does to activations before it multiplies them by weights, done to transformers' linear layers.

A product takes its right side in the type that goes with the weights' (`vec_dot_type`, ggml/src/ggml-cpu/ggml-cpu.c):
float32, float16 or bfloat16 for weights of these types, 8 bits with a scale for each block of 32 (Q8_0) or 256 (Q8_K)
values for quantized ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from converters.adapted_base import family_of, sizes_of
from converters.architectures.settings import complete, flatten
from converters.base_file import BaseFile
from converters.block_types import TYPES
from converters.restore import restored_places
from converters.tensor_kinds import EMBEDDING

Round = Callable[[torch.Tensor], torch.Tensor]


def q8_0(x: torch.Tensor) -> torch.Tensor:
    """`quantize_row_q8_0_ref` and back (ggml/src/ggml-quants.c)."""
    blocks = x.reshape(-1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return (torch.round(blocks * inverse) * scale.half().float()).reshape(x.shape)


def q8_k(x: torch.Tensor) -> torch.Tensor:
    """`quantize_row_q8_K_ref` and back (ggml/src/ggml-quants.c)."""
    blocks = x.reshape(-1, 256)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest != 0, -127 / largest, torch.zeros_like(largest))
    scale = torch.where(inverse != 0, 1 / inverse, inverse)
    return (torch.round(blocks * inverse).clamp(max=127) * scale).reshape(x.shape)


PLAIN: Mapping[str, Round] = {
    "F32": lambda x: x,
    "F16": lambda x: x.half().float(),
    "BF16": lambda x: x.bfloat16().float(),
}


def rounding_for(type_name: str) -> Round:
    """Of activations that meet weights of this type."""
    return PLAIN.get(type_name) or (q8_k if TYPES[type_name].block == 256 else q8_0)


def round_activations(model: Any, file: BaseFile) -> None:
    """Make every linear layer of a model that was loaded from `file` round what goes into it."""
    kinds = _types_by_module(model, file)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rounding = rounding_for(kinds[name])
            module.register_forward_pre_hook(lambda module, given, rounding=rounding: (rounding(given[0]),))


def _types_by_module(model: Any, file: BaseFile) -> dict[str, str]:
    header = file.header
    family, sizes = family_of(header), sizes_of(header)
    config = complete(flatten({**model.config.to_dict(), "architectures": [type(model).__name__]}), family)
    places = restored_places(family, sizes, config, header.tensors)
    found = {
        name.removesuffix(".weight"): header.tensors[place.gguf_name].type_name
        for place in places
        for name in place.hf_names(sizes)
    }
    return {"lm_head": header.tensors[EMBEDDING].type_name, **found}
