"""LoRA on bare parameters (`target_parameters`): the stacked weights of experts, and routers.

PEFT wraps the module that holds them, once for each of its parameters, so that a file has

    model.layers.0.mlp.experts.lora_A.weight             of the parameter wrapped last
    model.layers.0.mlp.experts.base_layer.lora_A.weight  of the one before it

A of all experts stand below one another, (experts * rank, columns), expert by expert; B's columns go rank by rank,
(rows, rank * experts) (`ParamWrapper`, peft/tuners/lora/layer.py).

PEFT before 0.19.1 took a stack of (experts, rows, columns) for one of (experts, columns, rows): A has the length of the
rows then. So did 0.19.0 with the stacks that transformers stores as transposes (gpt-oss), and only with those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, LowRank, ModuleProblem, Turned
from converters.methods.method import Module, no_base, scaled

WRAPPED = ".base_layer"
TURNED_IN, STRAIGHT_SINCE = (0, 19, 0), (0, 19, 1)
# Parameters in the order in which transformers' modules of experts hold them, which is that of PEFT's wrapping.
ORDER = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")


def is_parameter(module: Module) -> bool:
    return bool(_parameters(module))


def read(module: Module) -> Iterator[Change]:
    """The change of one parameter, a matrix or a stack of them."""
    depth, names = module.name.count(WRAPPED), _parameters(module)
    if depth >= len(names):
        raise ModuleProblem(f"is wrapped {depth + 1} times, target_parameters names {len(names)} parameters of it")
    name = names[-1 - depth]
    if "a" not in module or "b" not in module or "bias" in module:
        raise ModuleProblem("has not one A and one B, as LoRA on a parameter has")
    rank = module.config.of_module("r", "rank_pattern", name)
    alpha = module.config.of_module("lora_alpha", "alpha_pattern", name)
    scale = float(alpha / (np.sqrt(rank) if module.config["use_rslora"] else rank))
    yield _stack(module, name, rank, scale)


def _parameters(module: Module) -> list[str]:
    """Full names of the module's parameters that the adapter changes, in the order of wrapping."""
    owner = module.name.replace(WRAPPED, "")
    short = {key.rpartition(".")[2] for key in module.config["target_parameters"]}
    keys = module.config["target_parameters"]
    names = [name for each in short if _is_target(name := f"{owner}.{each}", keys) and _is_there(module, name)]
    return sorted(names, key=lambda name: _order(name.rpartition(".")[2]))


def _is_target(name: str, keys: tuple[str, ...]) -> bool:
    return any(name == key or name.endswith("." + key) for key in keys)


def _is_there(module: Module, name: str) -> bool:
    """Whether the base has such a parameter; a key like "down_proj" ends the names of modules, too."""
    if module.shape_in_base is no_base:
        return name.rpartition(".")[0].endswith((".experts", ".gate", ".router"))
    return module.shape_in_base(name) is not None


def _order(short: str) -> tuple[int, str]:
    return (ORDER.index(short), "") if short in ORDER else (len(ORDER), short)


def _stack(module: Module, name: str, rank: int, scale: float) -> LowRank:
    a, b = module.shape("a"), module.shape("b")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b or a[0] % rank:
        raise ModuleProblem(f"A {a} and B {b} are not those of matrices of rank {rank}")
    experts, columns, rows = a[0] // rank, a[1], b[0]
    if experts == 1:
        return LowRank(name, (rows, columns), rank, scale,
                       lambda: (scaled(module.load("b"), scale), module.load("a")))  # fmt: skip

    def load() -> tuple[Floats, Floats]:
        of_b = module.load("b").reshape(rows, rank, experts).transpose(2, 0, 1)
        return scaled(of_b, scale), module.load("a").reshape(experts, rank, columns)

    return LowRank(name, (experts, rows, columns), rank, scale, load, turned=_turned(module.config.values))


def _turned(config: Mapping[str, Any]) -> Turned:
    """By the version of PEFT that saved it; 0.18.0 was the first to write it down."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("peft_version") or ""), re.ASCII)
    if match is None:
        return Turned.UNKNOWN
    version = tuple(map(int, match.groups()))
    if version >= STRAIGHT_SINCE:
        return Turned.NEVER
    return Turned.ALWAYS if version == TURNED_IN else Turned.UNLESS_TRANSPOSED
