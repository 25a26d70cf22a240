"""VeRA (arXiv:2310.11454): W + diag(lambda_b) @ B @ diag(lambda_d) @ A, where all layers share A and B.

    base_model.vera_A            (rank, most columns)       base_model.model.<module>.vera_lambda_d  (rank,)
    base_model.vera_B            (most rows, rank)          base_model.model.<module>.vera_lambda_b  (rows,)

A layer takes the first columns of A and the first rows of B. Without `save_projection` both are drawn again from
`projection_prng_key`; PEFT then rounds them to the dtype that the base is loaded in, and here they are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from converters.checkpoint import Floats
from converters.methods.changes import Change, LowRank, ModuleProblem
from converters.methods.factored import quiet
from converters.methods.method import Method, Module
from converters.peft_settings import flag, rank, seed
from converters.torch_random import TorchGenerator


def read(module: Module) -> Iterator[Change]:
    yield projected(module, module.setting("r"))


def projected(module: Module, drawn_rank: int) -> LowRank:
    """The change of one layer.

    Args:
        drawn_rank: rows of A, of which the first `r` count.
    """
    rank, (rows, columns) = module.setting("r"), module.base_shape()
    module.check("lambda_b", rows)
    module.check("lambda_d", drawn_rank)
    if is_drawn := not module.setting("save_projection") and "a" not in module and "b" not in module:
        sizes = [module.base_shape(name) for name in module.siblings]
        most = max(size[0] for size in sizes), max(size[1] for size in sizes)
    else:
        _check_stored(module, drawn_rank, rows, columns)

    @quiet
    def load() -> tuple[Floats, Floats]:
        if is_drawn:
            a, b = _drawn(module.setting("projection_prng_key"), drawn_rank, rank, *most)
        else:
            a, b = module.rows("a", 0, rank), module.rows("b", 0, rows)
        scales_b, scales_d = module.load("lambda_b"), module.load("lambda_d")
        return scales_b[:, None] * b[:rows], scales_d[:rank, None] * a[:rank, :columns]

    return LowRank(module.weight, (rows, columns), rank, 1.0, load)


def _check_stored(module: Module, drawn_rank: int, rows: int, columns: int) -> None:
    if "a" not in module or "b" not in module:
        raise ModuleProblem("A and B, which all layers share, are not saved: save with save_projection=True")
    module.check("a", drawn_rank, None)
    module.check("b", None, module.setting("r"))
    if module.shape("a")[1] < columns or module.shape("b")[0] < rows:
        found = f"A {module.shape('a')} and B {module.shape('b')}"
        raise ModuleProblem(f"the shared {found} are smaller than its base's ({rows}, {columns})")


@lru_cache(maxsize=1)
def _drawn(seed: int, drawn_rank: int, rank: int, rows: int, columns: int) -> tuple[Floats, Floats]:
    """A and B, as large as the largest layer needs them."""
    generator = TorchGenerator(seed)
    return generator.kaiming_uniform((drawn_rank, columns)), generator.kaiming_uniform((rows, rank))


SETTINGS = {"r": rank(256), "save_projection": flag(True), "projection_prng_key": seed(0)}
METHOD = Method(
    "VeRA",
    "arXiv:2310.11454",
    parts={".vera_lambda_b": "lambda_b", ".vera_lambda_d": "lambda_d"},
    shared={"vera_A": "a", "vera_B": "b"},
    needed=("lambda_b", "lambda_d"),
    read=read,
    settings=SETTINGS,
    free=("d_initial", "fan_in_fan_out", "init_weights", "vera_dropout"),
)
