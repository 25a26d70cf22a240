"""Gemma 1. llama.cpp: src/models/gemma.cpp; its converter: conversion/gemma.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import attention, embeddings, gated_mlp, norm
from converters.architectures.family import IGNORED, PLUS_ONE, Config, Family
from converters.architectures.settings import common, rope_type_problems, theta_unless_usual, whole_rope
from converters.tokenizer_rules import GEMMA_1_RULES

GELU = ("gelu_pytorch_tanh", "gelu")  # transformers computes the first for both (`GemmaMLP`)
ROWS = (
    *embeddings(norm_value=PLUS_ONE)[:2],  # always tied
    norm("input_layernorm", "attn_norm", value=PLUS_ONE),
    *attention(),
    norm("post_attention_layernorm", "ffn_norm", value=PLUS_ONE),
    *gated_mlp(),
)


def plain(config: Config) -> dict[str, Any]:
    """What is common to all, but for the rotary settings, which this converter does not write."""
    values = {key: value for key, value in common(config).items() if not key.startswith("rope.")}
    return values | theta_unless_usual(config)


def problems(config: Config) -> list[str]:
    return [*rope_type_problems("default")(config), *whole_rope(config)]


DEFAULTS = {
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "head_dim": 256, "tie_word_embeddings": True,
}  # fmt: skip
FAMILY = Family(
    "gemma",
    ROWS,
    plain,
    defaults={**DEFAULTS, "num_key_value_heads": 16},
    activations=GELU,
    fixed={"attention_bias": False, "use_bidirectional_attention": False},
    problems=problems,
    ignored=(*IGNORED, r"lm_head\.weight"),
    tokenizer=GEMMA_1_RULES,
)
