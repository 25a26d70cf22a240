"""LoHa (FedPara, arXiv:2108.06098): W + alpha / r * (W1a @ W1b) * (W2a @ W2b), multiplied value by value.

PEFT's names: <module>.hada_w1_a (rows, rank), .hada_w1_b (rank, columns), and the same of w2. The product has rank^2
ranks: column (p, q) of B is column p of W1a times column q of W2a, and rows of A likewise.
"""

from __future__ import annotations

from collections.abc import Iterator

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem
from converters.methods.factored import factored, recent
from converters.methods.method import Method, Module, scaled
from converters.peft_settings import number, number_pattern, rank, rank_pattern

ROLES = ("w1a", "w1b", "w2a", "w2b")


def read(module: Module) -> Iterator[Change]:
    shapes = [module.shape(role) for role in ROLES]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[:2] != shapes[2:]:
        raise ModuleProblem(f"its matrices {', '.join(map(str, shapes))} do not fit together")
    (rows, rank), (ranks, columns) = shapes[:2]
    expected = module.setting("r", "rank_pattern")
    if rank != ranks or (module.config.is_valid and rank != expected):
        raise ModuleProblem(f"has ranks {rank} and {ranks}, {module.config.path.name} says {expected}")
    scale = float(module.setting("alpha", "alpha_pattern") / expected)

    def matrices() -> list[Floats]:
        return [module.load(role) for role in ROLES]

    def load() -> tuple[Floats, Floats]:
        w1a, w1b, w2a, w2b = matrices()
        b = (w1a[:, :, None] * w2a[:, None, :]).reshape(rows, -1)
        return scaled(b, scale), (w1b[:, None, :] * w2b[None, :, :]).reshape(-1, columns)

    def rows_of_change(start: int, stop: int) -> Floats:
        w1a, w1b, w2a, w2b = recent(matrices)
        return scaled((w1a[start:stop] @ w1b) * (w2a[start:stop] @ w2b), scale)

    yield factored(module.weight, (rows, columns), rank * rank, scale, load, rows_of_change)


METHOD = Method(
    "LoHa",
    "arXiv:2108.06098",
    parts={f".hada_{role[:2]}_{role[2]}": role for role in ROLES},
    read=read,
    needed=ROLES,
    settings={
        "r": rank(8),
        "alpha": number(8),
        "rank_pattern": rank_pattern(),
        "alpha_pattern": number_pattern(),
    },
    free=("init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"),
)
