"""StableLM 3B, Zephyr, StableLM 2. llama.cpp: src/models/stablelm.cpp; its converter: conversion/stablelm.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import BLK, LAYER, attention, embeddings, gated_mlp, norm, where
from converters.architectures.family import Config, Family, Row
from converters.architectures.settings import common, full_rope, rope_type_problems, theta_unless_usual, usual_head_dim

normed = where("qk_layernorm")
ROWS = (
    *embeddings(bias=True),
    norm("input_layernorm", "attn_norm", bias=True),
    *attention(bias="use_qkv_bias"),
    Row(f"{LAYER}.self_attn.q_layernorm.norms.{{each}}", f"{BLK}.attn_q_norm", ("heads", "head_dim"), each="heads",
        when=normed),
    Row(f"{LAYER}.self_attn.k_layernorm.norms.{{each}}", f"{BLK}.attn_k_norm", ("heads_kv", "head_dim"),
        each="heads_kv", when=normed),
    norm("post_attention_layernorm", "ffn_norm", bias=True,
         when=lambda config, layer: not config.get("use_parallel_residual")),
    *gated_mlp(),
)  # fmt: skip


def hyperparameters(config: Config) -> dict[str, Any]:
    others = ("rope.", "attention.layer_norm_rms")  # older files call their epsilon as others call that of an RMS norm
    values = {key: value for key, value in common(config).items() if not key.startswith(others)}
    head = config["hidden_size"] // config["num_attention_heads"]
    values |= {
        "rope.dimension_count": int(full_rope(config)["partial_rotary_factor"] * head),
        "use_parallel_residual": bool(config["use_parallel_residual"]),
    }
    return values | theta_unless_usual(config)


def problems(config: Config) -> list[str]:
    return [*usual_head_dim(config), *rope_type_problems("default")(config)]


FAMILY = Family(
    "stablelm",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25,
        "num_key_value_heads": 32, "use_parallel_residual": False,
    },
    aliases={"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"},
    fixed={"tie_word_embeddings": False},
    problems=problems,
    restored=lambda stored, found: {"qk_layernorm": stored.has("blk.{layer}.attn_q_norm.weight")},
)  # fmt: skip
