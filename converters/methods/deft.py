"""DEFT: W - Q @ P.T @ W + scale * Q @ R: what P reads of the outputs is taken out, and R put in its place.

    <module>.deft_P  (rows, rank)
    <module>.deft_R  (rank, columns), unless `para`, which puts nothing in

Q is P, and P.T is cut off below zero (decomposition_method "relu"); or both are the orthonormal factor of P ("qr",
Householder's, with LAPACK's signs). The scale is alpha / rank, or 1 without an alpha. The bias is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Shape, Transformed
from converters.methods.method import Method, Module, scaled
from converters.peft_settings import choice, flag, number, rank


def read(module: Module) -> Iterator[Change]:
    module.check("p", None, None)
    rows, count = module.shape("p")
    if count != min(module.setting("r"), rows):
        raise ModuleProblem(f"P has shape {(rows, count)}, {module.config.path.name} says rank {module.setting('r')}")
    if ("r" in module) == module.setting("para"):
        raise ModuleProblem(f"has {'an' if 'r' in module else 'no'} R, and para is {module.setting('para')}")
    if "r" in module:
        module.check("r", count, None)
    shape: Shape = (rows, module.shape("r")[1] if "r" in module else None)
    scale = module.setting("alpha") / count if module.setting("alpha") else 1.0

    def apply(weight: Floats, start: int) -> Floats:
        q, reading = _factors(module.load("p"), module.setting("decomposition_method"))
        taken = reading.T @ weight
        put = scaled(module.load("r"), scale) if "r" in module else np.float32(0)
        return np.asarray(weight + q @ (put - taken))

    yield Transformed(module.weight, shape, apply, by_rows=False, has_few_ranks=count < rows)


def _factors(p: Floats, method: str) -> tuple[Floats, Floats]:
    """Q and what is transposed to read the outputs, both (rows, rank)."""
    if method == "relu":
        return p, np.maximum(p, 0)
    q = np.linalg.qr(p.astype(np.float64))[0].astype(np.float32)
    return q, q


METHOD = Method(
    "DEFT",
    parts={".deft_P": "p", ".deft_R": "r"},
    needed=("p",),
    read=read,
    settings={
        "r": rank(8),
        "alpha": number(0),
        "decomposition_method": choice("relu", "relu", "qr"),
        "para": flag(False),
    },
    free=("deft_dropout", "fan_in_fan_out", "init_scale", "init_weights"),
)
