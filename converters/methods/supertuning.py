"""Super-Tuning (arXiv:2607.09287): some of the weights, W.flat[indices] + values; and LoRA beside it ("Supra").

PEFT's names: <module>.supertuning_indices (whole numbers), <module>.supertuning_values,
<module>.supertuning_lora_A.weight (r, columns), <module>.supertuning_lora_B.weight (rows, r).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem
from converters.methods.factored import added, recent
from converters.methods.method import Method, Module, Whole, scaled
from converters.peft_settings import Setting


def read(module: Module) -> Iterator[Change]:
    rows, columns = module.base_shape()
    if "indices" not in module:
        raise ModuleProblem("which weights it changes is not stored; save it with save_precomputed_indices=True")
    if module.shape("values") != module.shape("indices") or len(module.shape("values")) != 1:
        raise ModuleProblem(f"has {module.shape('values')} values for {module.shape('indices')} indices")
    indices = module.integers("indices")
    outside = indices[(indices < 0) | (indices >= rows * columns)]
    if outside.size:
        raise ModuleProblem(f"names weight {outside[0]} of {rows * columns}")
    has_pair = _check_pair(module, (rows, columns))

    def sparse() -> tuple[Whole, Floats]:
        where = module.integers("indices")
        order = np.argsort(where, kind="stable")
        return where[order], module.load("values").reshape(-1)[order]

    def rows_of_change(start: int, stop: int) -> Floats:
        where, values = recent(sparse)
        first, last = np.searchsorted(where, (start * columns, stop * columns))
        found = np.zeros((stop - start) * columns, np.float32)
        np.add.at(found, where[first:last] - start * columns, values[first:last])
        matrix: Floats = found.reshape(stop - start, columns)
        return matrix + _pair_rows(module, start, stop) if has_pair else matrix

    yield added(module.weight, (rows, columns), rows_of_change)


def _check_pair(module: Module, shape: tuple[int, int]) -> bool:
    """Whether there is LoRA beside it."""
    r = module.setting("r")
    found = [module.shape(role) for role in ("a", "b") if role in module]
    expected = [(r, shape[1]), (shape[0], r)] if r else []
    if found != expected:
        raise ModuleProblem(f"has factors {found}, and rank {r} of a weight {shape} asks for {expected}")
    return bool(r)


def _pair_rows(module: Module, start: int, stop: int) -> Floats:
    alpha, r = module.setting("lora_alpha"), module.setting("r")
    scale = float((2 * r if alpha is None else alpha) / r)
    return scaled(module.rows("b", start, stop), scale) @ module.load("a")


def _rank_problem(value: Any) -> str:
    is_rank = type(value) is int and 1 <= value < 2**31
    return "" if value is None or is_rank else "expected a whole number, 1 or more"


def _alpha_problem(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38
    return "" if value is None or is_number else "expected a number"


METHOD = Method(
    "Super-Tuning, Supra",
    "arXiv:2607.09287",
    parts={
        ".supertuning_indices": "indices",
        ".supertuning_values": "values",
        ".supertuning_lora_A.weight": "a",
        ".supertuning_lora_B.weight": "b",
    },
    read=read,
    needed=("values",),
    settings={"r": Setting(None, _rank_problem), "lora_alpha": Setting(None, _alpha_problem)},
    free=("init_weights", "lora_dropout", "save_precomputed_indices", "select_top", "sparsity"),
)
