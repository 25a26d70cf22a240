"""What the tables of the README are measured with: every PEFT method, and everything else that an adapter may be.

`CASES` are adapters that change weights, by name; those that a row of the README stands for are in `named_rows`.
`NO_CHANGE` are configurations of methods that change none.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from tests.equivalence import methods
from tests.equivalence.peft_methods import Case, nudged

LORA: Mapping[str, Any] = {"r": 4, "lora_alpha": 8}
TOKENS = [272, 204, 165, 88, 100, 15, 26, 8]  # the first of `some_ids`
ATTENTION_BIASES = ["q_proj", "v_proj"]

# What no GGUF adapter can hold: trained as a whole, or a bias.
WHOLE: Mapping[str, Case] = {
    "beft": Case("BeftConfig", {"target_modules": ATTENTION_BIASES}, model="llama-biases"),
    "layer norms": Case("LNTuningConfig", {"target_modules": ["input_layernorm"]}, randomize=nudged(0.3)),
    "trainable tokens": Case(
        "TrainableTokensConfig", {"token_indices": TOKENS, "target_modules": ["embed_tokens"]}, randomize=nudged(0.3)
    ),
}
CASES: Mapping[str, Case] = {**methods.CASES, **WHOLE}

# Settings of PEFT's LoRA and Super-Tuning that people call methods; the others have their method's name.
VARIANTS: Mapping[str, str] = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "bd-lora": "BD-LoRA",
    "kasa": "KaSA",
    "velora": "VeLoRA",
    "monteclora": "MonteCLoRA",
    "supertuning": "Super-Tuning",
    "supra": "Supra",
}

BESIDE: Mapping[str, Case] = {
    "rank and alpha patterns": Case(
        "LoraConfig", {**LORA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}, "use_rslora": True}
    ),
    "some layers, a regular expression for the modules": Case(
        "LoraConfig", {**LORA, "target_modules": r".*\.[12]\..*(q_proj|down_proj)"}
    ),
    "layers that are stored transposed (GPT-2's Conv1D)": Case(
        "LoraConfig", {**LORA, "target_modules": "all-linear", "fan_in_fan_out": True}, model="gpt2"
    ),
    "fused projections (Phi-3's qkv and gate_up)": Case(
        "LoraConfig", {**LORA, "target_modules": "all-linear"}, model="phi-3"
    ),
    "fused projections (GPT-NeoX)": Case("LoraConfig", {**LORA, "target_modules": "all-linear"}, model="gpt-neox"),
    "experts and their router (`target_parameters`)": Case(
        "LoraConfig",
        {
            **LORA,
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"],
        },
        model="qwen3-moe",
    ),
    "embeddings and output, untied": Case(
        "LoraConfig", {**LORA, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    ),
    "embeddings, tied to the output (`--untie` makes a base that can)": Case(
        "LoraConfig", {**LORA, "target_modules": ["embed_tokens", "q_proj"]}, model="qwen2-tied"
    ),
    "a bias on B (`lora_bias`)": Case("LoraConfig", {**LORA, "lora_bias": True, "target_modules": ["q_proj"]}),
    "trained biases (`bias`)": Case("LoraConfig", {**LORA, "bias": "all"}, model="llama-biases"),
    "trained norms (`modules_to_save`)": Case("LoraConfig", {**LORA, "modules_to_save": ["input_layernorm", "norm"]}),
    "a trained output (`modules_to_save`)": Case("LoraConfig", {**LORA, "modules_to_save": ["lm_head"]}),
    "a few trained tokens (`trainable_token_indices`)": Case(
        "LoraConfig", {**LORA, "trainable_token_indices": TOKENS}, randomize=nudged(0.3)
    ),
}

NO_CHANGE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ADAMSS": ("AdamssConfig", {"target_modules": ["q_proj"]}),
    "ADAPTION_PROMPT": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}),
    "CARTRIDGE": ("CartridgeConfig", {"num_virtual_tokens": 4, "num_frozen_tokens": 1}),
    "CPT": ("CPTConfig", {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}),
    "LILY": ("LilyConfig", {"target_modules": ["q_proj"], "r": 4}),
    "MULTITASK_PROMPT_TUNING": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 4, "num_tasks": 2}),
    "POLY": ("PolyConfig", {"target_modules": ["q_proj"], "n_tasks": 2}),
    "PREFIX_TUNING": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "PROMPT_TUNING": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "PSOFT": ("PsoftConfig", {"target_modules": ["q_proj"], "r": 4}),
    "P_TUNING": ("PromptEncoderConfig", {"num_virtual_tokens": 4}),
    "SHADOW": ("ShadowConfig", {}),
    "XLORA": ("XLoraConfig", {"hidden_size": 64, "xlora_size": 8}),
}
ONLY_CONFIGURED = ("ADAMSS",)  # PEFT needs scikit-learn for its layers


def peft_type(case: Case) -> str:
    """PEFT's name of a case's method ("LORA")."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return next(kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config.__name__ == case.config)


def named_rows() -> Mapping[str, str]:
    """Case to what people call its method, in the README's order: the first case of each method, and the variants."""
    from converters.methods import METHODS

    rows, seen = dict(VARIANTS), {"LORA", "SUPERTUNING"}
    for name, case in CASES.items():
        if (kind := peft_type(case)) not in seen:
            seen.add(kind)
            rows[name] = METHODS[kind].title
    return rows


def save_no_change(kind: str, network: Any, base: Path, folder: Path) -> None:
    """Save an adapter of a method that changes no weights, as PEFT does.

    Args:
        network: transformers' model, which becomes PEFT's.
        base: its folder.
    """
    import peft

    name, settings = NO_CHANGE[kind]
    own: dict[str, Any] = {"tokenizer_name_or_path": str(base)} if kind == "CPT" else {}
    if kind == "XLORA":
        lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(copy.deepcopy(network), lora).save_pretrained(folder / "expert")
        network.config.use_cache = False
        own = {"adapters": {"0": str(folder / "expert")}}
    with patch.dict(sys.modules, {"sklearn": types.ModuleType("sklearn")} if kind in ONLY_CONFIGURED else {}):
        config = getattr(peft, name)(task_type="CAUSAL_LM", **settings, **own)
    if kind in ONLY_CONFIGURED:
        config.save_pretrained(folder)
        save_file({"base_model.model.trained": torch.ones(1)}, folder / "adapter_model.safetensors")
    else:
        peft.get_peft_model(network, config).save_pretrained(folder)
