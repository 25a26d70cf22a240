"""LoKr (arXiv:2309.14859): W + alpha / r * kron(W1, W2), each whole or a product of two.

    W1 (a, c), or W1a (a, rank) @ W1b (rank, c)        rows = a * b
    W2 (b, d), or W2a (b, rank) @ W2b (rank, d)        columns = c * d

PEFT's names: <module>.lokr_w1, .lokr_w1_a, .lokr_w1_b, and the same of w2. A Kronecker product of factors is the
product of their Kronecker products: kron(W1, W2) = kron(B1, B2) @ kron(A1, A2), where a whole matrix is one factor and
the identity the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem
from converters.methods.factored import factored, recent
from converters.methods.method import Method, Module, scaled
from converters.peft_settings import number, number_pattern, rank, rank_pattern

PARTS = {f".lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}


def read(module: Module) -> Iterator[Change]:
    (a, c), (b, d) = _shape(module, "w1"), _shape(module, "w2")
    ranks = _rank(module, "w1") * _rank(module, "w2")
    scale = float(module.setting("alpha", "alpha_pattern") / module.setting("r", "rank_pattern"))

    def load() -> tuple[Floats, Floats]:
        (b1, a1), (b2, a2) = _factors(module, "w1"), _factors(module, "w2")
        return scaled(np.kron(b1, b2), scale), np.kron(a1, a2)

    def matrices() -> tuple[Floats, Floats]:
        return _whole(module, "w1"), _whole(module, "w2")

    def rows_of_change(start: int, stop: int) -> Floats:
        w1, w2 = recent(matrices)
        first, second = np.divmod(np.arange(start, stop), b)
        return scaled((w1[first][:, :, None] * w2[second][:, None, :]).reshape(-1, c * d), scale)

    yield factored(module.weight, (a * b, c * d), ranks, scale, load, rows_of_change)


def _shape(module: Module, name: str) -> tuple[int, int]:
    """Of W1 or W2."""
    stored = [role for role in (name, f"{name}_a", f"{name}_b") if role in module]
    shapes = [module.shape(role) for role in stored]
    if stored not in ([name], [f"{name}_a", f"{name}_b"]) or any(len(s) != 2 or 0 in s for s in shapes):
        raise ModuleProblem(f"has {dict(zip(stored, shapes, strict=True)) or 'nothing'} for its {name}")
    if len(stored) == 1:
        return shapes[0][0], shapes[0][1]
    (rows, rank), (ranks, columns) = shapes
    expected = module.setting("r", "rank_pattern")
    if rank != ranks or (module.config.is_valid and rank != expected):
        raise ModuleProblem(f"{name} has ranks {rank} and {ranks}, {module.config.path.name} says {expected}")
    return rows, columns


def _rank(module: Module, name: str) -> int:
    stored = module.shape(f"{name}_a")[1] if f"{name}_a" in module else min(_shape(module, name))
    return min(stored, *_shape(module, name))


def _whole(module: Module, name: str) -> Floats:
    return module.load(name) if name in module else module.load(f"{name}_a") @ module.load(f"{name}_b")


def _factors(module: Module, name: str) -> tuple[Floats, Floats]:
    """Two factors of W1 or W2 with as few ranks as its shape or PEFT's own two have."""
    rows, columns = _shape(module, name)
    if f"{name}_a" in module and module.shape(f"{name}_a")[1] <= min(rows, columns):
        return module.load(f"{name}_a"), module.load(f"{name}_b")
    whole, identity = _whole(module, name), np.eye(min(rows, columns), dtype=np.float32)
    return (whole, identity) if columns <= rows else (identity, whole)


METHOD = Method(
    "LoKr",
    "arXiv:2309.14859",
    parts=PARTS,
    read=read,
    settings={
        "r": rank(8),
        "alpha": number(8),
        "rank_pattern": rank_pattern(),
        "alpha_pattern": number_pattern(),
    },
    free=(
        "decompose_both", "decompose_factor", "init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale",
        "use_effective_conv2d",
    ),
)  # fmt: skip
