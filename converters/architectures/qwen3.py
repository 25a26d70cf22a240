"""Qwen3. llama.cpp: src/models/qwen3.cpp; its converter: conversion/qwen.py."""

from __future__ import annotations

from converters.architectures.blocks import attention, embeddings, gated_mlp, head_norms, norm
from converters.architectures.family import Family
from converters.architectures.qwen2 import DEFAULTS, notices, problems
from converters.architectures.settings import common
from converters.tokenizer_rules import QWEN_RULES

ATTENTION = (*attention(bias="attention_bias"), *head_norms())
ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *ATTENTION,
    norm("post_attention_layernorm", "ffn_norm"),
    *gated_mlp(),
)
FAMILY = Family(
    "qwen3",
    ROWS,
    common,
    defaults={**DEFAULTS, "head_dim": 128},
    fixed={"attention_bias": False},
    problems=problems,
    notices=notices,
    tokenizer=QWEN_RULES,
)
