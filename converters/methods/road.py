"""RoAD (arXiv:2409.00119): pairs of outputs are turned by an angle and scaled.

    <module>.road_theta, <module>.road_alpha  (rows / 2,) road_1   (rows,) road_2   (rows * 2,) road_4

Output i of the first half of a group goes with output i + size / 2:

    y[i]            = alpha cos(theta) y[i] - alpha sin(theta) y[i + size / 2]
    y[i + size / 2] = alpha cos(theta) y[i + size / 2] + alpha sin(theta) y[i]

Both share an angle (road_1), each has its own (road_2), or its sine and its cosine have their own (road_4). The
outputs are those of the weight and the bias together.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import recent
from converters.methods.method import Method, Module
from converters.peft_settings import choice, rank

# Variant to how many angles there are for two outputs.
ANGLES = {"road_1": 1, "road_2": 2, "road_4": 4}


def read(module: Module) -> Iterator[Change]:
    group, variant = module.setting("group_size"), module.setting("variant")
    module.check("theta", None)
    module.check("alpha", *module.shape("theta"))
    rows, left = divmod(2 * module.shape("theta")[0], ANGLES[variant])
    if left or group % 2 or rows % group:
        raise ModuleProblem(
            f"has {module.shape('theta')[0]} angles, which do not go with {variant} in groups of {group}"
        )

    def factors() -> tuple[Floats, Floats]:
        return _factors(module.load("theta"), module.load("alpha"), variant, group)

    def apply(values: Floats, start: int) -> Floats:
        return turned(values, *recent(factors), group)

    yield Transformed(module.weight, (rows, None), apply, by_rows=False)
    yield Transformed(module.bias, (rows,), lambda values, start: apply(values.T, 0).T, by_rows=False, if_there=True)


def turned(values: Floats, own: Floats, other: Floats, group: int) -> Floats:
    """Outputs (rows, any): each times its own factor, and the other one of its pair times another."""
    pairs = values.reshape(-1, 2, group // 2, values.shape[1])
    partners = np.stack((-pairs[:, 1], pairs[:, 0]), axis=1).reshape(values.shape)
    partners *= other[:, None]
    return partners + values * own[:, None]


def _factors(theta: Floats, alpha: Floats, variant: str, group: int) -> tuple[Floats, Floats]:
    """For each output: what it is multiplied by, and what the other one of its pair is (rows,)."""
    cosine, sine = alpha * np.cos(theta), alpha * np.sin(theta)
    if variant == "road_1":
        return _for_both(cosine, group), _for_both(sine, group)
    if variant == "road_2":
        return cosine, sine
    return cosine.reshape(-1, 2, group)[:, 0].reshape(-1), sine.reshape(-1, 2, group)[:, 1].reshape(-1)


def _for_both(values: Floats, group: int) -> Floats:
    return np.repeat(values.reshape(-1, group // 2), 2, axis=0).reshape(-1)


METHOD = Method(
    "RoAD",
    "arXiv:2409.00119",
    parts={".road_theta": "theta", ".road_alpha": "alpha"},
    needed=("theta", "alpha"),
    read=read,
    settings={"variant": choice("road_1", *ANGLES), "group_size": rank(64)},
    free=("init_weights",),
)
