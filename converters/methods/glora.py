"""GLoRA (arXiv:2306.07967): W + W * A + B, and the bias b + b * D + E + W @ C, value by value.

Each of the five is stored as one of

    <module>.glora_A.Xd, <module>.glora_A.Xu  (rows, rank), (rank, columns)   their product   "lora"
    <module>.glora_A.X                        (rows, 1), D and E (rows,)                      "vector"
                                              (1,)                                            "constant"
    <module>.glora_A.zeros                    (rows, columns), whole                          "none"

C is (columns, 1), and C, D and E are zeros where the layer has no bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.method import Method, Module
from converters.peft_settings import choice, rank

# Setting to the parts that it makes PEFT store.
STORED = {"lora": {"Xd", "Xu"}, "vector": {"X"}, "constant": {"X"}, "none": {"zeros"}}
ENDINGS = ("Xd", "Xu", "X", "zeros")
SETTING = {"A": "config_A_B", "B": "config_A_B", "C": "config_C", "D": "config_D_E", "E": "config_D_E"}


def read(module: Module) -> Iterator[Change]:
    kinds = {letter: _kind(module, letter) for letter in SETTING}
    columns = _columns(module, kinds["C"])
    rows = _rows(module, kinds)
    for letter in "AB":
        _check_matrix(module, letter, kinds[letter], rows, columns)
    for letter in "DE":
        _check_vector(module, letter, kinds[letter], rows)
    yield Transformed(module.weight, (rows, columns), partial(_weight, module, kinds))
    yield from _bias(module, kinds, rows)


def _kind(module: Module, letter: str) -> str:
    """How one of the five is stored; raises ModuleProblem where the settings say otherwise."""
    configured = module.setting(SETTING[letter])
    found = {ending for ending in ENDINGS if f"{letter}.{ending}" in module}
    if found == STORED[configured]:
        return str(configured)
    if letter in "CDE" and found == STORED["none"]:  # a layer without a bias
        return "none"
    raise ModuleProblem(f"{letter} is stored as {sorted(found)}, {SETTING[letter]} is {configured}")


def _rows(module: Module, kinds: dict[str, str]) -> int | None:
    """As a part tells that has as many; constants do not."""
    tell = {"lora": "Xd", "vector": "X", "none": "zeros"}
    told = (f"{letter}.{tell[kinds[letter]]}" for letter in "ADE" if kinds[letter] in tell)
    return next((module.shape(role)[0] for role in told if module.shape(role)), None)


def _check_matrix(module: Module, letter: str, kind: str, rows: int | None, columns: int) -> None:
    if kind == "lora":
        module.check(f"{letter}.Xd", rows, module.setting("r"))
        module.check(f"{letter}.Xu", module.setting("r"), columns)
    elif kind == "none":
        module.check(f"{letter}.zeros", rows, columns)
    else:
        module.check(f"{letter}.X", *((rows, 1) if kind == "vector" else (1,)))


def _check_vector(module: Module, letter: str, kind: str, rows: int | None) -> None:
    sizes = 1 if kind == "constant" else rows
    module.check(f"{letter}.{'zeros' if kind == 'none' else 'X'}", sizes)


def _columns(module: Module, kind: str) -> int:
    """As C tells, which is as long as the layer's input."""
    if kind == "lora":
        module.check("C.Xd", None, module.setting("r"))
        module.check("C.Xu", module.setting("r"), 1)
    else:
        module.check("C.X" if kind == "vector" else "C.zeros", None, 1)
    c = _c(module, kind)
    if kind == "none" and np.any(c):
        raise ModuleProblem("C holds other than zeros")
    return len(c)


def _c(module: Module, kind: str) -> Floats:
    if kind == "lora":
        return module.load("C.Xd") @ module.load("C.Xu")
    return module.load("C.X" if kind == "vector" else "C.zeros")


def _weight(module: Module, kinds: dict[str, str], rows: Floats, start: int) -> Floats:
    a, b = (_matrix(module, letter, kinds[letter], start, start + len(rows)) for letter in "AB")
    return rows + rows * a + b


def _matrix(module: Module, letter: str, kind: str, start: int, stop: int) -> Floats:
    """Some rows of A or B, or what stands for them: one column, or one value."""
    if kind == "lora":
        return module.rows(f"{letter}.Xd", start, stop) @ module.load(f"{letter}.Xu")
    if kind == "constant":
        return module.load(f"{letter}.X")
    return module.rows(f"{letter}.{'X' if kind == 'vector' else 'zeros'}", start, stop)


def _bias(module: Module, kinds: dict[str, str], rows: int | None) -> Iterator[Change]:
    d, e = (f"{letter}.{'zeros' if kinds[letter] == 'none' else 'X'}" for letter in "DE")
    c = _c(module, kinds["C"])

    def apply(bias: Floats, start: int) -> Floats:
        changed = bias + bias * module.load(d) + module.load(e)
        return changed + (module.weight_in_base(module.weight) @ c).T if np.any(c) else changed

    if np.any(c) or np.any(module.load(d)) or np.any(module.load(e)):
        yield Transformed(module.bias, (rows,), apply, if_there=kinds["D"] == "none")


METHOD = Method(
    "GLoRA",
    "arXiv:2306.07967",
    parts={f".glora_{letter}.{ending}": f"{letter}.{ending}" for letter in SETTING for ending in ENDINGS},
    read=read,
    settings={
        "r": rank(8),
        "config_A_B": choice("lora", "lora", "vector", "constant", "none"),
        "config_C": choice("lora", "lora", "vector", "none"),
        "config_D_E": choice("constant", "vector", "constant", "none"),
    },
    free=("init_weights",),
)
