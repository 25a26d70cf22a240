"""OSF (arXiv:2504.07097): the base's smaller singular values and their vectors, trained.

    <module>.osf_svd_params.U_low  (rows, count)
    <module>.osf_svd_params.S_low  (count,)
    <module>.osf_svd_params.V_low  (count, columns)

The others stay as they are: W becomes its best approximation of rank min(rows, columns) - count, and U @ diag(S) @ V.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.method import Method, Module


def read(module: Module) -> Iterator[Change]:
    module.check("values", None)
    (count,) = module.shape("values")
    module.check("left", None, count)
    module.check("right", count, None)
    shape = module.shape("left")[0], module.shape("right")[1]
    if count >= min(shape):
        raise ModuleProblem(
            f"has {count} singular values of a {shape[0]}x{shape[1]} weight, and leaves none to the base"
        )

    def apply(weight: Floats, start: int) -> Floats:
        trained = (module.load("left") * module.load("values")) @ module.load("right")
        return np.asarray(trained + largest(weight, min(shape) - count), np.float32)

    yield Transformed(module.weight, shape, apply, by_rows=False)


def largest(weight: Floats, rank: int) -> Floats:
    """The best approximation of a matrix of that rank: its projection on its largest singular vectors.

    They are the eigenvectors of the smaller one of W @ W.T and W.T @ W, whose sums need float64.
    """
    is_wide = weight.shape[0] <= weight.shape[1]
    exact = weight.astype(np.float64)
    try:
        vectors = np.linalg.eigh(exact @ exact.T if is_wide else exact.T @ exact)[1][:, -rank:]  # they ascend
    except np.linalg.LinAlgError:  # a base with NaN; what comes of it is refused by name
        return np.full_like(weight, np.nan)
    kept = vectors @ (vectors.T @ exact) if is_wide else (exact @ vectors) @ vectors.T
    return np.asarray(kept, np.float32)


METHOD = Method(
    "OSF",
    "arXiv:2504.07097",
    parts={
        ".osf_svd_params.U_low": "left",
        ".osf_svd_params.S_low": "values",
        ".osf_svd_params.V_low": "right",
    },
    needed=("left", "values", "right"),
    read=read,
    free=("effective_rank", "init_weights", "rank_pattern", "target_svd_config"),
)
