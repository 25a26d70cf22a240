"""SHiRA (arXiv:2406.13175): numbers are added to a few places of W.

<module>.shira_weight   (count,)
<module>.shira_indices  (2, count): the row and the column of each
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import quiet
from converters.methods.method import Method, Module, Whole


def read(module: Module) -> Iterator[Change]:
    shape = module.base_shape()
    module.check("weight", None)
    module.check("indices", 2, *module.shape("weight"))
    places = module.integers("indices")
    if places.min() < 0 or np.any(places.max(axis=1) >= shape):
        raise ModuleProblem(f"indices go to {tuple(places.max(axis=1).tolist())}, its base's weight is {shape}")

    def apply(weight: Floats, start: int) -> Floats:
        return added(weight, start, module.integers("indices"), module.load("weight"))

    yield Transformed(module.weight, shape, apply, uses_weight=False)


@quiet
def added(weight: Floats, start: int, places: Whole, values: Floats) -> Floats:
    """`weight`, the first row of which is row `start`, with values added at places (2, count)."""
    inside = (places[0] >= start) & (places[0] < start + len(weight))
    changed = weight.copy()
    np.add.at(changed, (places[0][inside] - start, places[1][inside]), values[inside])
    return changed


METHOD = Method(
    "SHiRA",
    "arXiv:2406.13175",
    parts={".shira_weight": "weight", ".shira_indices": "indices"},
    needed=("weight", "indices"),
    read=read,
    free=("fan_in_fan_out", "init_weights", "mask_type", "r", "random_seed"),
)
