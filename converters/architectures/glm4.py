"""GLM-4 (0414). llama.cpp: src/models/glm4.cpp; its converter: conversion/glm.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import attention, embeddings, fused_mlp, norm
from converters.architectures.family import Config, Family
from converters.architectures.settings import common, rope_type_problems, rotary_dim
from converters.tokenizer_rules import GLM_4_RULES

ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *attention(bias="attention_bias"),
    norm("post_self_attn_layernorm", "post_attention_norm"),
    norm("post_attention_layernorm", "ffn_norm"),
    *fused_mlp(),
    norm("post_mlp_layernorm", "post_ffw_norm"),
)


def hyperparameters(config: Config) -> dict[str, Any]:
    return {**common(config), "rope.dimension_count": rotary_dim(config)}


FAMILY = Family(
    "glm4",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07, "head_dim": 128, "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5, "attention_bias": True,
    },
    problems=rope_type_problems("default", "linear", "yarn"),
    tokenizer=GLM_4_RULES,
)  # fmt: skip
