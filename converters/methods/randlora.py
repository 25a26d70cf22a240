"""RandLoRA (arXiv:2502.00987): W + scale * a sum of bases, each the product of two random matrices and two diagonals.

    base_model.randlora_A        (rank, 1, short)             also stored beside every layer
    base_model.randlora_B        (long, bases, rank)          likewise
    <module>.randlora_lambda     (rank, bases of the layer)
    <module>.randlora_gamma      (bases of the layer, shorter side of the layer)

"short" and "long" are the largest sides among all layers. For a layer with at least as many rows as columns, and
with its part of A and B, the change is B' @ A', where A' is A * lambda * gamma for every rank and base, (rank * bases,
columns), and B' is B, (rows, bases * rank): PEFT lets the two orders of rank and base differ. For a layer with fewer
rows it is the transpose of that. Without `save_projection` A and B are drawn again, in bfloat16 unless they are sparse:
PEFT takes that type wherever the machine has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil, sqrt

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import quiet
from converters.methods.method import Method, Module
from converters.peft_settings import flag, number, rank, seed
from converters.torch_random import ROUNDED, TorchGenerator

SPARSITY = 3.0  # one number in three is not zero
SLOPE = sqrt(5.0)  # of the leaky ReLU that the bound of the drawn numbers is made for


def read(module: Module) -> Iterator[Change]:
    rank, shape = module.setting("r"), module.base_shape()
    short, long = min(shape), max(shape)
    bases = ceil(short / rank)
    module.check("lambda", rank, bases)
    module.check("gamma", bases, short)
    projections = _projections(module, bases, short, long)
    is_tall = shape[0] >= shape[1]

    @quiet
    def apply(weight: Floats, start: int) -> Floats:
        stop, a = start + len(weight), _scaled(module, projections.a(short))
        if is_tall:
            return weight + projections.b(start, stop, bases) @ a
        return weight + a[:, start:stop].T @ projections.b(0, long, bases).T

    yield Transformed(module.weight, shape, apply, uses_weight=False)


def _scaled(module: Module, a: Floats) -> Floats:
    """A', (rank * bases, shorter side), with the scale in it."""
    scale = np.float32(module.setting("randlora_alpha") / module.setting("r"))
    lambdas, gamma = module.load("lambda") * scale, module.load("gamma")
    return (a * lambdas[:, :, None] * gamma).reshape(lambdas.size, len(gamma[0]))


@dataclass(frozen=True)
class Projections:
    """A (rank, 1, shorter side) and rows of B (rows, bases * rank), of one layer."""

    a: Callable[[int], Floats]
    b: Callable[[int, int, int], Floats]


def _projections(module: Module, bases: int, short: int, long: int) -> Projections:
    if not module.setting("save_projection") and "a" not in module and "b" not in module:
        return _drawn_again(module)
    if "a" not in module or "b" not in module:
        raise ModuleProblem("A and B, which all layers share, are not saved: save with save_projection=True")
    rank = module.setting("r")
    module.check("a", rank, 1, None)
    module.check("b", None, None, rank)
    if module.shape("a")[2] < short or module.shape("b")[0] < long or module.shape("b")[1] < bases:
        raise ModuleProblem(f"A {module.shape('a')} and B {module.shape('b')} are too small for ({long}, {short})")
    most = module.shape("b")[1]

    def some_of_b(start: int, stop: int, bases: int) -> Floats:
        return _flat(module.rows("b", start * most, stop * most).reshape(stop - start, most, rank), bases)

    return Projections(lambda short: module.load("a")[:, :, :short], some_of_b)


def _drawn_again(module: Module) -> Projections:
    sizes = [module.base_shape(name) for name in module.siblings]
    most = max(rows for rows, _ in sizes), max(columns for _, columns in sizes)
    sparsity = sqrt(min(most)) if module.setting("very_sparse") else SPARSITY if module.setting("sparse") else None
    draw = partial(_drawn, module.setting("projection_prng_key"), module.setting("r"), min(most), max(most), sparsity)
    return Projections(
        lambda short: draw()[0][:, :, :short], lambda start, stop, bases: _flat(draw()[1][start:stop], bases)
    )


@lru_cache(maxsize=1)
def _drawn(key: int, rank: int, short: int, long: int, sparsity: float | None) -> tuple[Floats, Floats]:
    """A and B of the largest layer, each with a standard deviation of one."""
    generator, bases = TorchGenerator(key), ceil(short / rank)
    if sparsity is not None:
        return _sparse(generator.rand((rank, 1, short)), sparsity), _sparse(
            generator.rand((long, bases, rank)), sparsity
        )
    a = generator.kaiming_uniform((rank, 1, short), SLOPE, "BF16")
    b = np.concatenate([generator.kaiming_uniform((long, 1, rank), SLOPE, "BF16") for _ in range(bases)], axis=1)
    return _normalized(a), _normalized(b)


def _sparse(uniform: Floats, sparsity: float) -> Floats:
    """-1, 0 and 1, divided by their standard deviation."""
    end = 1 / (2 * sparsity)
    signs = (uniform > np.float32(1 - end)).astype(np.float32) - (uniform < np.float32(end))
    return signs / np.float32(signs.std(ddof=1, dtype=np.float64))


def _normalized(values: Floats) -> Floats:
    """bfloat16 values divided by their standard deviation, each step rounded to bfloat16."""
    deviation = np.array([values.std(ddof=1, dtype=np.float64)], np.float32)
    return ROUNDED["BF16"](values / ROUNDED["BF16"](deviation))


def _flat(b: Floats, bases: int) -> Floats:
    return np.ascontiguousarray(b[:, :bases]).reshape(len(b), -1)


METHOD = Method(
    "RandLoRA",
    "arXiv:2502.00987",
    parts={
        ".randlora_lambda": "lambda", ".randlora_gamma": "gamma", ".randlora_A": "a", ".randlora_B": "b",
    },
    shared={"randlora_A": "a", "randlora_B": "b"},
    needed=("lambda", "gamma"),
    read=read,
    settings={
        "r": rank(32),
        "randlora_alpha": number(640),
        "save_projection": flag(True),
        "projection_prng_key": seed(0),
        "sparse": flag(False),
        "very_sparse": flag(False),
    },
    free=("fan_in_fan_out", "init_weights", "randlora_dropout"),
)  # fmt: skip
