"""LoRA with its variants: settings that say how A and B are to be understood.

use_dora          `dora`
use_qalora        A multiplies the means of groups of inputs (QA-LoRA, arXiv:2309.14717); A (rank, groups)
use_bdlora        A or B is block-diagonal (BD-LoRA); A (rank, columns / blocks), or B (rows, rank / blocks)
kasa_config       `kasa`
velora_config     LoRA whose training keeps less (VeLoRA, arXiv:2405.17991); <module>.lora_velora_embed is left out
monteclora_config LoRA whose training adds noise to A (MonteCLoRA, arXiv:2411.04358), and evaluation none;
                  <module>.lora_monteclora_sampler.* is left out
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from converters.checkpoint import Floats
from converters.methods import dora, kasa, lora, parameters
from converters.methods.changes import Change, LowRank, ModuleProblem, Shifted
from converters.methods.factored import quiet
from converters.methods.lora import check_pair, scale_of
from converters.methods.method import Module, scaled
from converters.peft_settings import Setting, flag, rank

Reader = Callable[[Module], Iterator[Change]]
BLOCK_KEYS = frozenset(("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"))

_SAMPLER = ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
PARTS: Mapping[str, str] = {
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_diag": "diagonal",
    ".lora_velora_embed": "training's projection",
    **{f".lora_monteclora_sampler.{name}": f"training's {name}" for name in _SAMPLER},
}
OWNERS: Mapping[str, str] = {"magnitude": "use_dora", "diagonal": "kasa_config"}
WITHOUT_BIAS = ("use_dora", "use_qalora")


def read(module: Module) -> Iterator[Change]:
    variant = variant_of(module)
    if not variant:
        yield from lora.read(module)
        return
    if parameters.is_parameter(module):
        raise ModuleProblem(f"{variant} is of layers, and target_parameters names this one's parameters")
    yield from READERS[variant](module)
    if "bias" in module:
        yield _shift(module, variant)


def variant_of(module: Module) -> str:
    """The setting that makes a module's factors another method's; "" for LoRA itself.

    Raises:
        ModuleProblem: two variants at once, or tensors that do not go together.
    """
    chosen = [key for key in READERS if module.config[key] not in (None, False)]
    if len(chosen) > 1:
        raise ModuleProblem(f"is {' and '.join(chosen)} at once, which PEFT cannot be")
    foreign = [role for role, key in OWNERS.items() if role in module and key not in chosen]
    if foreign and module.config.is_valid:
        raise ModuleProblem(f"has a {foreign[0]}, and {OWNERS[foreign[0]]} is off")
    if {"embedding_a", "embedding_b"} & set(module.parts) and {"a", "b", "bias"} & set(module.parts):
        raise ModuleProblem("has the factors of a layer and of an embedding")
    return chosen[0] if chosen else ""


def _shift(module: Module, variant: str) -> Change:
    """What B's bias adds (`lora_bias`)."""
    if variant in WITHOUT_BIAS:
        raise ModuleProblem(f"has a bias on B, which PEFT leaves out with {variant}")
    scale = scale_of(module)
    return Shifted(module.bias, module.shape("bias"), lambda: scaled(module.load("bias"), scale))


def read_pooled(module: Module) -> Iterator[Change]:
    """QA-LoRA: the mean of `group` inputs, times the number of groups, is what A multiplies."""
    check_pair(module)
    (rank, groups), (rows, _) = module.shape("a"), module.shape("b")
    group, scale = module.setting("qalora_group_size"), scale_of(module)

    @quiet
    def load() -> tuple[Floats, Floats]:
        a = np.repeat(module.load("a") * np.float32(groups / group), group, axis=1)
        return scaled(module.load("b"), scale), a

    yield LowRank(module.weight, (rows, groups * group), rank, scale, load)


def read_blocks(module: Module) -> Iterator[Change]:
    """BD-LoRA: the blocks stand below one another in the file."""
    config = module.config["use_bdlora"]
    a_in_blocks, b_in_blocks = (
        any(pattern in module.name for pattern in config.get(key) or ())
        for key in ("target_modules_bd_a", "target_modules_bd_b")
    )
    if a_in_blocks and b_in_blocks:
        raise ModuleProblem("use_bdlora names it for A and for B")
    blocks = config.get("nblocks", 1)
    (rank, columns), (rows, ranks) = _block_sizes(module, blocks if a_in_blocks else 1, blocks if b_in_blocks else 1)
    if rank != ranks:
        raise ModuleProblem(f"A has rank {rank}, B {ranks}, with {blocks} blocks")
    expected = module.setting("r", "rank_pattern")
    if rank != expected and module.config.is_valid:
        raise ModuleProblem(f"has rank {rank}, {module.config.path.name} says {expected}")
    scale = scale_of(module)

    def load() -> tuple[Floats, Floats]:
        a, b = module.load("a"), scaled(module.load("b"), scale)
        return (diagonal(b, blocks) if b_in_blocks else b), (diagonal(a, blocks) if a_in_blocks else a)

    yield LowRank(module.weight, (rows, columns), rank, scale, load)


def _block_sizes(module: Module, a_blocks: int, b_blocks: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rank, columns) of A and (rows, rank) of B as whole matrices."""
    sizes = []
    for role, blocks in (("a", a_blocks), ("b", b_blocks)):
        shape = module.shape(role) if role in module else ()
        if len(shape) != 2 or 0 in shape or shape[0] % blocks:
            raise ModuleProblem(f"{role.upper()} is {shape or 'not there'}, and must be a matrix of {blocks} blocks")
        sizes.append((shape[0], shape[1] * blocks))
    return sizes[0], sizes[1]


def diagonal(stacked: Floats, blocks: int) -> Floats:
    """(rows, columns) of blocks below one another to (rows, columns * blocks) with them on the diagonal."""
    rows, columns = stacked.shape[0] // blocks, stacked.shape[1]
    found = np.zeros((blocks, rows, blocks, columns), np.float32)
    where = np.arange(blocks)
    found[where, :, where] = stacked.reshape(blocks, rows, columns)
    return found.reshape(blocks * rows, blocks * columns)


def _blocks_problem(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict) or set(value) - BLOCK_KEYS:
        return f"expected {', '.join(sorted(BLOCK_KEYS))}"
    for key in ("target_modules_bd_a", "target_modules_bd_b"):
        names = value.get(key)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            return f"{key}: expected a list of names"
    return rank(1).problem(value.get("nblocks", 1))


def _kasa_problem(value: Any) -> str:
    return (
        ""
        if value is None or (isinstance(value, dict) and set(value) <= {"beta", "gamma"})
        else "expected its settings"
    )


READERS: Mapping[str, Reader] = {
    "use_dora": dora.read,
    "use_qalora": read_pooled,
    "use_bdlora": read_blocks,
    "kasa_config": kasa.read,
}
SETTINGS: Mapping[str, Setting] = {
    "use_dora": flag(False),
    "use_qalora": flag(False),
    "qalora_group_size": rank(16),
    "use_bdlora": Setting(None, _blocks_problem),
    "kasa_config": Setting(None, _kasa_problem),
}
METHOD = replace(
    lora.METHOD,
    title="LoRA, rsLoRA, DoRA, QA-LoRA, BD-LoRA, KaSA, VeLoRA, MonteCLoRA",
    parts={**lora.METHOD.parts, **PARTS},
    read=read,
    settings={**lora.METHOD.settings, **SETTINGS},
    free=(*(key for key in lora.METHOD.free if key not in SETTINGS), "velora_config", "monteclora_config"),
    refused={
        **lora.METHOD.refused,
        "arrow_config": "Arrow picks adapters token by token (arXiv:2405.11157)",
    },
)
