"""GPT-2, whose linear layers are stored transposed. llama.cpp: src/models/gpt2.cpp; converter: conversion/gpt2.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import BLK
from converters.architectures.family import IGNORED, Config, Family, Row

BLOCK = "transformer.h.{layer}"
GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
ROWS = (
    Row("transformer.wte", "token_embd", ("vocab", "embedding")),
    Row("transformer.wpe", "position_embd", ("context", "embedding")),
    Row("transformer.ln_f", "output_norm", ("embedding",), bias=True),
    Row("lm_head", "output", ("vocab", "embedding"), absent_if_tied=True),
    Row(f"{BLOCK}.ln_1", f"{BLK}.attn_norm", ("embedding",), bias=True),
    Row(f"{BLOCK}.attn.c_attn", f"{BLK}.attn_qkv", ("qkv_rows", "embedding"), transposed=True, bias=True),
    Row(f"{BLOCK}.attn.c_proj", f"{BLK}.attn_output", ("embedding", "embedding"), transposed=True, bias=True),
    Row(f"{BLOCK}.ln_2", f"{BLK}.ffn_norm", ("embedding",), bias=True),
    Row(f"{BLOCK}.mlp.c_fc", f"{BLK}.ffn_up", ("feed_forward", "embedding"), transposed=True, bias=True),
    Row(f"{BLOCK}.mlp.c_proj", f"{BLK}.ffn_down", ("embedding", "feed_forward"), transposed=True, bias=True),
)


def hyperparameters(config: Config) -> dict[str, Any]:
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
    }


FAMILY = Family(
    "gpt2",
    ROWS,
    hyperparameters,
    defaults={"max_position_embeddings": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    # `intermediate_size` is no key of this model: what a file calls so says nothing about it
    derived=lambda config: {"intermediate_size": config.get("n_inner") or 4 * config["hidden_size"],
                            "num_key_value_heads": config["num_attention_heads"]},
    derived_wins=True,
    kinds={"n_inner": "whole?"},
    restored=lambda stored, found: {"n_inner": found["intermediate_size"]},
    aliases={"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
             "n_positions": "max_position_embeddings"},
    activations=GELU,
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ignored=(*IGNORED, r".*\.attn\.bias", r".*\.attn\.masked_bias"),
)  # fmt: skip
