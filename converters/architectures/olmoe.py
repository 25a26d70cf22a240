"""OLMoE. llama.cpp: src/models/olmoe.cpp; its converter: conversion/olmo.py."""

from __future__ import annotations

from converters.architectures.blocks import attention, embeddings, experts, head_norms, norm
from converters.architectures.family import Config, Family
from converters.architectures.olmo2 import problems
from converters.architectures.settings import common

EPSILON = 1e-5  # what its converter writes, whatever the configuration says
ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *attention(),
    *head_norms(q=("q_rows",), k=("kv_rows",)),
    norm("post_attention_layernorm", "ffn_norm"),
    *experts(),
)


def all_problems(config: Config) -> list[str]:
    heads, heads_kv = config["num_attention_heads"], config["num_key_value_heads"]
    shared = [] if heads == heads_kv else [f"num_key_value_heads is {heads_kv}, and llama.cpp's olmoe expects {heads}"]
    return [*shared, *problems(config)]


FAMILY = Family(
    "olmoe",
    ROWS,
    common,
    defaults={
        "max_position_embeddings": 4096, "rms_norm_eps": EPSILON, "num_experts": 64, "num_experts_per_tok": 8,
    },
    fixed={
        "attention_bias": False, "tie_word_embeddings": False, "clip_qkv": None, "norm_topk_prob": False,
        "rms_norm_eps": EPSILON,
    },
    problems=all_problems,
)  # fmt: skip
