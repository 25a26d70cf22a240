"""(IA)3 (arXiv:2205.05638): a trained factor for each output, or for each input of a feedforward module.

<module>.ia3_l  (rows, 1)     row i of W, and value i of the bias, times factor i
                (1, columns)  column j of W times factor j
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.method import Method, Module
from converters.peft_settings import names


def read(module: Module) -> Iterator[Change]:
    shape = module.shape("factors")
    of_inputs = is_feedforward(module)
    if len(shape) != 2 or 0 in shape or shape[0 if of_inputs else 1] != 1:
        what, wanted = ("inputs", "(1, any)") if of_inputs else ("outputs", "(any, 1)")
        raise ModuleProblem(f"its factors are {shape}; feedforward_modules makes them those of its {what}, {wanted}")
    if of_inputs:
        yield Transformed(module.weight, (None, shape[1]), lambda rows, start: rows * module.load("factors"))
        return
    yield Transformed(
        module.weight, (shape[0], None), lambda rows, start: rows * module.rows("factors", start, start + len(rows))
    )
    yield Transformed(module.bias, shape[:1], lambda rows, start: rows * module.load("factors").T, if_there=True)


def is_feedforward(module: Module) -> bool:
    """As `IA3Model._check_target_module_feedforward`: a list holds endings of names, of whole ones or not."""
    given = module.setting("feedforward_modules")
    if isinstance(given, str):
        return re.fullmatch(given, module.name) is not None
    return any(module.name.endswith(name) for name in given)


METHOD = Method(
    "(IA)3",
    "arXiv:2205.05638",
    parts={".ia3_l": "factors"},
    read=read,
    settings={"feedforward_modules": names()},
    free=("fan_in_fan_out", "init_ia3_weights"),
)
