"""PEFT folders written by hand, without torch: random LoRA weights strong enough to change every answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module name within a layer -> (out, in), for the Llama family."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    return {
        **{f"self_attn.{name}": shape for name, shape in attention.items()},
        **{f"mlp.{name}": (wide, hidden) for name in ("gate_proj", "up_proj")},
        "mlp.down_proj": (hidden, wide),
    }


def write_lora(folder: Path, base: Path, *, seed: int, rank: int = 8, strength: float = 0.5, **config: Any) -> Path:
    """A PEFT LoRA folder for the HF base in `base`.

    Args:
        strength: standard deviation of `B @ A`'s effect relative to a unit input; 0.5 changes every answer.
        config: more keys for adapter_config.json.
    """
    from safetensors.numpy import save_file

    model = json.loads((base / "config.json").read_text())
    random, tensors = np.random.default_rng(seed), {}
    for layer in range(model["num_hidden_layers"]):
        for module, (n_out, n_in) in linear_shapes(model).items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = random.normal(0, n_in**-0.5, (rank, n_in)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = random.normal(0, strength * rank**-0.5, (n_out, rank)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": [*MODULES],
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
