"""LoRA's variants and relatives."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.equivalence.peft_methods import Case, near, normal

CONV1D = {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc", "c_proj"]}
PATTERNS = {"rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"q_proj": 2}}
BLOCKS = {"target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj", "up_proj"], "nblocks": 4}
MLP = ["gate_proj", "up_proj", "down_proj"]


def strong(name: str, parameter: torch.nn.Parameter) -> None:
    """For products of four matrices: a standard deviation of 0.5."""
    torch.nn.init.normal_(parameter, std=0.5)


def dora(name: str, parameter: torch.nn.Parameter) -> None:
    """Lengths around 1, factors as LoRA's."""
    (near(1.0) if "magnitude" in name else normal)(name, parameter)


CASES: Mapping[str, Case] = {
    "dora": Case("LoraConfig", {"use_dora": True, "lora_alpha": 16}, randomize=dora),
    "dora, rslora, patterns": Case(
        "LoraConfig", {"use_dora": True, "use_rslora": True, **PATTERNS}, "llama-biases", randomize=dora
    ),
    "dora on Conv1D": Case("LoraConfig", {"use_dora": True, **CONV1D}, "gpt2", randomize=dora),
    "bd-lora": Case(
        "LoraConfig", {"use_bdlora": {**BLOCKS, "match_strict": False}, "r": 8, "lora_alpha": 16}, randomize=normal
    ),
    "kasa": Case("LoraConfig", {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}, "r": 8}, randomize=strong),
    "kasa with a bias on B": Case(
        "LoraConfig", {"kasa_config": {"beta": 1e-4}, "lora_bias": True}, "llama-biases", randomize=strong
    ),
    "velora": Case("LoraConfig", {"velora_config": {"num_groups": 8, "init_type": "random"}}),
    "monteclora": Case("LoraConfig", {"monteclora_config": {"num_samples": 4, "buffer_size": 2}}),
    "adalora": Case("AdaLoraConfig", {"total_step": 10, "lora_alpha": 32}, randomize=strong),
    "adalora on Conv1D": Case("AdaLoraConfig", {"total_step": 10, "init_r": 4, **CONV1D}, "gpt2", randomize=strong),
    "loha": Case("LoHaConfig", {"r": 4, "alpha": 16}, randomize=strong),
    "loha of many ranks": Case("LoHaConfig", {"r": 8, "alpha": 8, **PATTERNS}, randomize=strong),
    "lokr": Case("LoKrConfig", {"r": 2, "alpha": 8}, randomize=strong),
    "lokr, both matrices whole": Case("LoKrConfig", {"r": 64, "alpha": 64, "decompose_factor": 4}, randomize=strong),
    "lokr, both matrices decomposed": Case(
        "LoKrConfig", {"r": 2, "decompose_both": True, "rank_pattern": {"q_proj": 1}}, randomize=strong
    ),
    "lokr, an odd factor": Case(
        "LoKrConfig", {"r": 3, "decompose_factor": 3, "init_weights": "lycoris"}, randomize=strong
    ),
    "miss": Case("MissConfig", {"r": 8}),
    "miss, a rank that does not divide the inputs": Case("MissConfig", {"r": 7}, "llama-biases"),
    "miss of many ranks": Case("MissConfig", {"r": 64}),
    "miss mini": Case("MissConfig", {"r": 8, "mini_r": 4, "init_weights": "mini"}),
    "miss mini, wide": Case("MissConfig", {"r": 4, "mini_r": 16, "init_weights": "mini"}),
    "miss bat": Case("MissConfig", {"r": 16, "init_weights": "bat"}, "llama-biases"),
    "gralora": Case("GraloraConfig", {"r": 8, "alpha": 16}),
    "gralora of four parts": Case("GraloraConfig", {"r": 4, "gralora_k": 4}),
    "gralora, hybrid": Case("GraloraConfig", {"r": 8, "hybrid_r": 4}),
    "gralora of many ranks": Case("GraloraConfig", {"r": 32, "hybrid_r": 8, "gralora_k": 4}),
    "gralora on Conv1D": Case("GraloraConfig", {"r": 8, "hybrid_r": 2, **CONV1D}, "gpt2"),
    "peanut": Case("PeanutConfig", {"r": 8, "scaling": 2.0}, randomize=strong),
    "peanut with a network": Case("PeanutConfig", {"r": 8, "depth": 2, "act_fn": "gelu"}, randomize=strong),
    "supertuning": Case("SupertuningConfig", {"sparsity": 0.9}),
    "supertuning of the smallest": Case("SupertuningConfig", {"sparsity": 0.5, "select_top": False}, "llama-biases"),
    "supra": Case("SupertuningConfig", {"sparsity": 0.9, "r": 4, "lora_alpha": 16}),
}
