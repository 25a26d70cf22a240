"""Qwen2 and Qwen2.5. llama.cpp: src/models/qwen2.cpp; its converter: conversion/qwen.py."""

from __future__ import annotations

from converters.architectures.blocks import attention, embeddings, gated_mlp, norm
from converters.architectures.family import Config, Family
from converters.architectures.settings import common, rope_type_problems, usual_head_dim, whole_rope
from converters.tokenizer_rules import QWEN_RULES

ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *attention(bias=True),
    norm("post_attention_layernorm", "ffn_norm"),
    *gated_mlp(),
)
DEFAULTS = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_key_value_heads": 32}


def problems(config: Config) -> list[str]:
    return [*rope_type_problems("default", "linear", "yarn")(config), *whole_rope(config)]


def problems_of_plain_heads(config: Config) -> list[str]:
    return [*usual_head_dim(config), *problems(config)]


def notices(config: Config) -> list[str]:
    if not config.get("use_sliding_window") or not isinstance(window := config.get("sliding_window"), int):
        return []
    return [f"sliding_window {window} is not applied by llama.cpp: equal up to {window} tokens of context"]


FAMILY = Family(
    "qwen2", ROWS, common, defaults=DEFAULTS, problems=problems_of_plain_heads, notices=notices, tokenizer=QWEN_RULES
)
