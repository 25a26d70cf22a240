"""UniLoRA (arXiv:2506.00799): LoRA whose A and B take their numbers from one vector that all layers share.

    base_model.unilora_theta_d          (length,)
    <module>.unilora_indices_A, _B      (rank, columns), (rows, rank): which number of theta_d stands where
    <module>.unilora_scales_A, _B       likewise: what it is multiplied by

Without `save_indices` PEFT draws the indices again, layer after layer in the order in which the model's class makes
them, which neither the adapter nor the base tells.
"""

from __future__ import annotations

from collections.abc import Iterator

from converters.checkpoint import Floats
from converters.methods.changes import Change, LowRank, ModuleProblem
from converters.methods.factored import quiet
from converters.methods.method import Method, Module
from converters.peft_settings import Setting, rank

NOT_SAVED = (
    "which layer takes which numbers is not saved; set it to true in this file, load the adapter with PEFT and save it "
    "again"
)


def read(module: Module) -> Iterator[Change]:
    rank = module.setting("r")
    module.check("theta_d", None)
    module.check("indices_a", rank, None)
    module.check("indices_b", None, rank)
    for side in ("a", "b"):
        module.check(f"scales_{side}", *module.shape(f"indices_{side}"))
        _check_indices(module, f"indices_{side}")
    shape = module.shape("indices_b")[0], module.shape("indices_a")[1]
    yield LowRank(module.weight, shape, rank, 1.0, lambda: (_taken(module, "b"), _taken(module, "a")))


def _check_indices(module: Module, role: str) -> None:
    indices, (length,) = module.integers(role), module.shape("theta_d")
    if indices.min() < 0 or indices.max() >= length:
        raise ModuleProblem(f"{role} go from {indices.min()} to {indices.max()}, and theta_d has {length} numbers")


@quiet
def _taken(module: Module, side: str) -> Floats:
    return module.load("theta_d")[module.integers(f"indices_{side}")] * module.load(f"scales_{side}")


PARTS = {f".unilora_{what}_{side.upper()}": f"{what}_{side}" for what in ("indices", "scales") for side in ("a", "b")}
METHOD = Method(
    "UniLoRA",
    "arXiv:2506.00799",
    parts=PARTS,
    shared={"unilora_theta_d": "theta_d"},
    needed=("theta_d", *PARTS.values()),
    read=read,
    settings={"r": rank(4), "save_indices": Setting(False, lambda value: "" if value is True else NOT_SAVED)},
    free=(
        "fan_in_fan_out", "init_theta_d_bound", "init_weights", "proj_seed", "theta_d_length", "unilora_dropout",
    ),
)  # fmt: skip
