"""HRA (arXiv:2405.17484): W times a chain of Householder reflections, W @ (I - 2 u1 u1.T) @ (I - 2 u2 u2.T) ...

    <module>.hra_u  (columns, rank), one vector a column; each is divided by its length

With `apply_GS` the vectors are made orthogonal to one another first (Gram and Schmidt). Either way the chain is
I - U @ T @ U.T with a small triangular T (the compact WY form), so that rows of W need two thin products.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.blocks import Doubles
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import recent
from converters.methods.method import Method, Module
from converters.peft_settings import flag, rank


def read(module: Module) -> Iterator[Change]:
    module.check("vectors", None, module.setting("r"))
    columns, count = module.shape("vectors")
    is_orthogonal = module.setting("apply_GS")
    if is_orthogonal and count > columns:
        raise ModuleProblem(f"{count} vectors of {columns} values cannot be orthogonal to one another (apply_GS)")

    def chain() -> tuple[Floats, Floats]:
        u, t = reflections(module.load("vectors").astype(np.float64), is_orthogonal)
        return u.astype(np.float32), np.asarray(t @ u.T, np.float32)

    def apply(rows: Floats, start: int) -> Floats:
        u, rest = recent(chain)
        return np.asarray(rows - (rows @ u) @ rest, np.float32)

    yield Transformed(module.weight, (None, columns), apply, has_few_ranks=count < columns)


def reflections(vectors: Doubles, is_orthogonal: bool) -> tuple[Doubles, Doubles]:
    """U (columns, rank) and T (rank, rank) of the product of all reflections, I - U @ T @ U.T."""
    count = vectors.shape[1]
    if is_orthogonal:
        return np.linalg.qr(vectors)[0], 2 * np.eye(count)
    with np.errstate(invalid="ignore"):  # a vector of zeros is no direction, in PEFT neither: NaN, refused by name
        u = vectors / np.linalg.norm(vectors, axis=0)
    inner, t = u.T @ u, np.zeros((count, count))
    for each in range(count):
        t[:each, each] = -2 * t[:each, :each] @ inner[:each, each]
        t[each, each] = 2
    return u, t


METHOD = Method(
    "HRA",
    "arXiv:2405.17484",
    parts={".hra_u": "vectors"},
    read=read,
    settings={"r": rank(8), "apply_GS": flag(False)},
    free=("init_weights",),
)
