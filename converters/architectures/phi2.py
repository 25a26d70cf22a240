"""Phi-1.5 and Phi-2. llama.cpp: src/models/phi2.cpp; its converter: conversion/phi.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import BLK, LAYER, attention, norm
from converters.architectures.family import Config, Family, Row
from converters.architectures.settings import common, full_rope, rope_type_problems, theta_unless_usual
from converters.tokenizer_rules import TokenizerRules

GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
ROWS = (
    Row("model.embed_tokens", "token_embd", ("vocab", "embedding")),
    Row("model.final_layernorm", "output_norm", ("embedding",), bias=True),
    Row("lm_head", "output", ("vocab", "embedding"), bias=True),
    norm("input_layernorm", "attn_norm", bias=True),
    *attention(bias=True, output_bias=True, output="dense"),
    Row(f"{LAYER}.mlp.fc1", f"{BLK}.ffn_up", ("feed_forward", "embedding"), bias=True),
    Row(f"{LAYER}.mlp.fc2", f"{BLK}.ffn_down", ("embedding", "feed_forward"), bias=True),
)


def hyperparameters(config: Config) -> dict[str, Any]:
    values = {key: value for key, value in common(config).items() if not key.startswith("rope.")}
    share, heads = full_rope(config)["partial_rotary_factor"], config["num_attention_heads"]
    values |= {"attention.head_count_kv": heads, "rope.dimension_count": int(share * config["hidden_size"]) // heads}
    return values | theta_unless_usual(config)


def problems(config: Config) -> list[str]:
    size, heads, heads_kv = (
        config["intermediate_size"],
        config["num_attention_heads"],
        config.get("num_key_value_heads"),
    )
    checks = (
        (size == 4 * config["hidden_size"], f"intermediate_size is {size}, expected 4 times hidden_size"),
        (heads_kv in (None, heads), f"num_key_value_heads is {heads_kv}, expected {heads}"),
    )
    return [*(problem for ok, problem in checks if not ok), *rope_type_problems("default")(config)]


FAMILY = Family(
    "phi2",
    ROWS,
    hyperparameters,
    defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    derived=lambda config: {"intermediate_size": 4 * config["hidden_size"]},
    aliases={"n_positions": "max_position_embeddings", "layer_norm_epsilon": "layer_norm_eps"},
    activations=GELU,
    fixed={"qk_layernorm": False, "tie_word_embeddings": False},
    problems=problems,
    tokenizer=TokenizerRules(add_bos=False),
)
