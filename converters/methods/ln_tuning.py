"""LayerNorm tuning (arXiv:2312.11420): whole norms, trained.

<module>.ln_tuning_layers.weight, <module>.ln_tuning_layers.bias
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from converters.methods.changes import Change, ModuleProblem, Replaced
from converters.methods.method import Method, Module


def read(module: Module) -> Iterator[Change]:
    for role in module.parts:
        shape = module.shape(role)
        if not shape or 0 in shape:
            raise ModuleProblem(f"{role} has shape {shape}")
        yield Replaced(f"{module.name}.{role}", shape, partial(module.load, role))


METHOD = Method(
    "LayerNorm tuning",
    "arXiv:2312.11420",
    parts={".ln_tuning_layers.weight": "weight", ".ln_tuning_layers.bias": "bias"},
    read=read,
)
