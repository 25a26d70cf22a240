"""AdaLoRA (arXiv:2303.10512): W + alpha / (init_r + 1e-5) * B @ diag(E) @ A, of as many ranks as training kept.

PEFT's names: <module>.lora_A (rank, columns), <module>.lora_E (rank, 1), <module>.lora_B (rows, rank). It saves the
ranks that are left, none where it took all away, and tells in its configuration which of the first ones these are:

    "rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [true, false, true, ...]}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, LowRank, ModuleProblem
from converters.methods.factored import quiet
from converters.methods.method import Method, Module, scaled
from converters.peft_settings import Setting, rank


def read(module: Module) -> Iterator[Change]:
    a, e, b = (module.shape(role) for role in ("a", "e", "b"))
    if len(a) != 2 or len(b) != 2 or e != (a[0], 1) or a[0] != b[1] or 0 in (a[1], b[0]):
        raise ModuleProblem(f"A {a}, E {e} and B {b} do not fit together")
    kept = module.config["rank_pattern"].get(f"{module.name}.lora_E")
    expected = module.setting("init_r") if kept is None else sum(kept)
    if module.config.is_valid and a[0] != expected:
        raise ModuleProblem(f"has rank {a[0]}, {module.config.path.name} says {expected}")
    if a[0] > 0:
        yield _low_rank(module, (b[0], a[1]), a[0])


def _low_rank(module: Module, shape: tuple[int, int], rank: int) -> LowRank:
    scale = float(module.setting("lora_alpha") / (np.float32(module.setting("init_r")) + np.float32(1e-5)))

    @quiet
    def load() -> tuple[Floats, Floats]:
        return scaled(module.load("b"), scale), scaled(module.load("a") * module.load("e"), 1.0)

    return LowRank(module.weight, shape, rank, scale, load)


def _kept_problem(value: Any) -> str:
    rows = value.values() if isinstance(value, dict) else (None,)
    if all(isinstance(row, list) and all(isinstance(kept, bool) for kept in row) for row in rows):
        return ""
    return "expected names to lists of true and false"


def _alpha_problem(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if is_number and 0 < value < 3e38 else "expected a number above 0"


METHOD = Method(
    "AdaLoRA",
    "arXiv:2303.10512",
    parts={".lora_A": "a", ".lora_E": "e", ".lora_B": "b"},
    read=read,
    needed=("a", "e", "b"),
    settings={"init_r": rank(12), "lora_alpha": Setting(8, _alpha_problem), "rank_pattern": Setting({}, _kept_problem)},
    free=(
        # of the schedule, and LoRA's that PEFT's AdaLoRA does not look at
        "alpha_pattern", "arrow_config", "beta1", "beta2", "corda_config", "deltaT", "ensure_weight_tying",
        "eva_config", "fan_in_fan_out", "init_lora_weights", "kasa_config", "loftq_config", "lora_bias",
        "lora_dropout", "lora_ga_config", "megatron_core", "monteclora_config", "orth_reg_weight",
        "qalora_group_size", "r", "runtime_config", "target_r", "tfinal", "tinit", "total_step",
        "trainable_token_indices", "use_bdlora", "use_qalora", "use_rslora", "velora_config",
    ),
    refused={
        "alora_invocation_tokens": "AdaLoRA has no activated form",
        "layer_replication": "layers are repeated, which the base does not do",
        "megatron_config": "Megatron's parallel layers have weights of their own",
        "target_parameters": "AdaLoRA changes layers only",
        "use_dora": "AdaLoRA has no DoRA",
    },
)  # fmt: skip
