"""DeLoRA (arXiv:2503.18225): W + B @ diag(lambda / rank / (|a| |b|)) @ A * n, of vectors a and b of length one.

<module>.delora_A       (rank, columns)    its rows are divided by their lengths
<module>.delora_B       (rows, rank)       and its columns
<module>.delora_lambda  (1,)
<module>.delora_w_norm  (columns,)         n, the lengths of the base's columns when the training began
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.blocks import Doubles
from converters.methods.changes import Change
from converters.methods.factored import factored, recent
from converters.methods.method import Method, Module
from converters.peft_settings import rank, rank_pattern

SHORTEST = 1e-4  # PEFT divides by no length below


def read(module: Module) -> Iterator[Change]:
    count = module.setting("r", "rank_pattern")
    module.check("a", count, None)
    module.check("b", None, count)
    rows, columns = module.shape("b")[0], module.shape("a")[1]
    module.check("lambda", 1)
    module.check("norms", columns)

    def factors() -> tuple[Floats, Floats]:
        a, b = module.load("a"), module.load("b")
        lengths = _lengths(a, 1) * _lengths(b, 0)
        return b * (module.load("lambda") / count / lengths).astype(np.float32), a * module.load("norms")

    def rows_of_change(start: int, stop: int) -> Floats:
        b, a = recent(factors)
        return b[start:stop] @ a

    yield factored(module.weight, (rows, columns), count, 1.0, factors, rows_of_change)


def _lengths(vectors: Floats, axis: int) -> Doubles:
    lengths: Doubles = np.linalg.norm(vectors.astype(np.float64), axis=axis)
    return np.maximum(lengths, SHORTEST)


METHOD = Method(
    "DeLoRA",
    "arXiv:2503.18225",
    parts={".delora_A": "a", ".delora_B": "b", ".delora_lambda": "lambda", ".delora_w_norm": "norms"},
    needed=("a", "b", "lambda", "norms"),
    read=read,
    settings={"r": rank(8), "rank_pattern": rank_pattern()},
    free=("delora_lambda", "init_weights", "lambda_pattern", "module_dropout"),
)
