"""Samples of the changes that an adapter of any method makes to a model's linear modules.

A module is given a few vectors with the adapter and without; what comes out differs by the change. So nothing has to be
known of the method but that it changes a weight. What is not a linear module on its own (embeddings, experts that are
parameters of one module) is counted, and not sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelora.change_samples import ChangeSample, inputs_of, sample

MAX_CHANGES = 1024
"""Modules sampled, evenly over the model: 64 KiB of numbers."""
Outputs = npt.NDArray[np.float64]


def adapted_modules(model: Any) -> dict[str, tuple[int, int]]:
    """Module name in transformers to (outputs, inputs), of the linear ones that PEFT wraps; (0, 0) of others."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = model.get_base_model().named_modules()
    return {name: _shape(module) for name, module in named if isinstance(module, BaseTunerLayer)}


def _shape(module: Any) -> tuple[int, int]:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    base = module.get_base_layer()
    if hasattr(module, "parameter_name"):  # PEFT's wrapper of a bare parameter, around whatever module has it
        return (0, 0)
    if type(base) is Linear:
        return (base.out_features, base.in_features)
    return (int(base.weight.shape[1]), int(base.weight.shape[0])) if type(base) is Conv1D else (0, 0)


def chosen_modules(modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Those that are sampled: at most `MAX_CHANGES`, evenly."""
    linear = {name: shape for name, shape in modules.items() if all(shape)}
    at = np.unique(np.linspace(0, len(linear) - 1, min(MAX_CHANGES, len(linear))).round().astype(np.int64))
    names = list(linear)
    return {names[i]: linear[names[i]] for i in at}


def outputs_of(model: Any, modules: Mapping[str, tuple[int, int]]) -> dict[str, Outputs]:
    """What each module makes of its vectors, float64 (SAMPLES, n_outputs), as the adapter stands."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = {}
    with torch.inference_mode():
        for name, (_, n_inputs) in modules.items():
            module = copy.deepcopy(inner.get_submodule(name)).eval()  # dropout is of training alone
            module = module.float()  # half precision would hide a small change
            device = next(module.parameters()).device
            vectors = torch.from_numpy(inputs_of(f"{name}.weight", n_inputs)).float().to(device)
            found[name] = module(vectors).double().cpu().numpy()
    return found


def samples(
    modules: Mapping[str, tuple[int, int]], adapted: Mapping[str, Outputs], bare: Mapping[str, Outputs]
) -> Iterator[ChangeSample]:
    """The change of each module."""
    for name, shape in modules.items():
        values = sample(f"{name}.weight", adapted[name] - bare[name])
        yield ChangeSample(f"{name}.weight", shape, values.astype(np.float32))
