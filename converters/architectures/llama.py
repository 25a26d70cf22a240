"""Llama 1, 2 and 3, and the models that are Llama under another name (Mistral, SmolLM2, Yi, TinyLlama); Mixtral.

llama.cpp: src/models/llama.cpp; its converter: conversion/llama.py.
"""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import attention, embeddings, experts, gated_mlp, norm
from converters.architectures.family import Config, Family, Indices, interleaved_rows
from converters.architectures.settings import (
    common,
    head_dim,
    llama3_factors,
    rope_type_problems,
    whole_rope,
    window_notices,
)
from converters.architectures.sizes import Sizes
from converters.tokenizer_rules import LLAMA_RULES


def q_order(sizes: Sizes) -> Indices:
    return interleaved_rows(sizes["heads"], sizes["head_dim"])


def k_order(sizes: Sizes) -> Indices:
    return interleaved_rows(sizes["heads_kv"], sizes["head_dim"])


def is_dense(config: Config, layer: int | None) -> bool:
    return not config.get("num_experts")


def is_sparse(config: Config, layer: int | None) -> bool:
    return bool(config.get("num_experts"))


ATTENTION = attention(bias="attention_bias", output_bias="attention_bias", q_order=q_order, k_order=k_order)
DENSE = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *ATTENTION,
    norm("post_attention_layernorm", "ffn_norm"),
    *gated_mlp(bias="mlp_bias", when=is_dense),
)
ROWS = (*DENSE, *experts(hf="block_sparse_moe", each=("w1", "w3", "w2"), when=is_sparse))


def hyperparameters(config: Config) -> dict[str, Any]:
    return {**common(config), "vocab_size": config["vocab_size"], "rope.dimension_count": head_dim(config)}


def problems(config: Config) -> list[str]:
    return [*rope_type_problems("default", "linear", "llama3", "yarn")(config), *whole_rope(config)]


MODULES = {".mlp.experts": ".block_sparse_moe.experts", ".mlp.gate.": ".block_sparse_moe.gate."}
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
FAMILY = Family(
    "llama", ROWS, hyperparameters, defaults=DEFAULTS, fills_head_dim=True, problems=problems,
    computed=llama3_factors, tokenizer=LLAMA_RULES, modules=MODULES,
)  # fmt: skip
MISTRAL = Family(
    "llama", ROWS, hyperparameters,
    defaults={**DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    fills_head_dim=True, problems=problems, notices=window_notices, computed=llama3_factors, tokenizer=LLAMA_RULES,
)  # fmt: skip
MIXTRAL = Family(
    "llama",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8,
        "num_experts_per_tok": 2, "num_experts": 8,
    },
    aliases={"num_local_experts": "num_experts"},
    modules=MODULES,
    problems=problems,
    notices=window_notices,
    computed=llama3_factors,
    tokenizer=LLAMA_RULES,
)  # fmt: skip
