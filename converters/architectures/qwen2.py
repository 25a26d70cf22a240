"""Qwen2 and Qwen2.5. llama.cpp: src/models/qwen2.cpp; its converter: conversion/qwen.py."""

from __future__ import annotations

from converters.architectures.blocks import attention, embeddings, gated_mlp, norm
from converters.architectures.family import Config, Family
from converters.architectures.settings import common, rope_type_problems, whole_rope
from converters.tokenizer_rules import QWEN_RULES

ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *attention(bias=True),
    norm("post_attention_layernorm", "ffn_norm"),
    *gated_mlp(),
)
DEFAULTS = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}


def problems(config: Config) -> list[str]:
    return [*rope_type_problems("default", "linear", "yarn")(config), *whole_rope(config)]


def notices(config: Config) -> list[str]:
    if not config.get("use_sliding_window") or not isinstance(window := config.get("sliding_window"), int):
        return []
    return [f"sliding_window {window} is not applied by llama.cpp: equal up to {window} tokens of context"]


FAMILY = Family("qwen2", ROWS, common, defaults=DEFAULTS, problems=problems, notices=notices, tokenizer=QWEN_RULES)
