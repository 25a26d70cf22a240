"""Qwen3-MoE. llama.cpp: src/models/qwen3moe.cpp; its converter: conversion/qwen.py."""

from __future__ import annotations

from converters.architectures.blocks import embeddings, experts, norm
from converters.architectures.family import Config, Family
from converters.architectures.qwen2 import DEFAULTS, notices, problems
from converters.architectures.qwen2_moe import EVERY_LAYER, hyperparameters
from converters.architectures.qwen3 import ATTENTION

ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *ATTENTION,
    norm("post_attention_layernorm", "ffn_norm"),
    *experts(),
)


def all_problems(config: Config) -> list[str]:
    # transformers' own default is False, which no released model has; llama.cpp normalizes always
    normalizes = (
        [] if config.get("norm_topk_prob") else ["norm_topk_prob is False, and llama.cpp's qwen3moe normalizes"]
    )
    return [*normalizes, *problems(config)]


FAMILY = Family(
    "qwen3moe",
    ROWS,
    hyperparameters,
    defaults={
        **DEFAULTS, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "num_key_value_heads": 4,
    },
    aliases={"num_local_experts": "num_experts"},
    fixed={**EVERY_LAYER, "attention_bias": False},
    problems=all_problems,
    restored=lambda stored, found: {"norm_topk_prob": True},
    notices=notices,
)  # fmt: skip
