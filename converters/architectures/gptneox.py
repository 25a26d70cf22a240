"""GPT-NeoX and Pythia. llama.cpp: src/models/gptneox.cpp; its converter: conversion/gptneox.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import BLK
from converters.architectures.family import IGNORED, Config, Family, Indices, Row, grouped_rows
from converters.architectures.settings import full_rope, rope_type_problems, theta_unless_usual
from converters.architectures.sizes import Sizes

BLOCK = "gpt_neox.layers.{layer}"


def _qkv(sizes: Sizes) -> Indices:
    """A checkpoint has q, k and v of one head after the other."""
    return grouped_rows(sizes["heads"], (sizes["head_dim"],) * 3, (0, 1, 2))


ROWS = (
    Row("gpt_neox.embed_in", "token_embd", ("vocab", "embedding")),
    Row("gpt_neox.final_layer_norm", "output_norm", ("embedding",), bias=True),
    Row("embed_out", "output", ("vocab", "embedding"), absent_if_tied=True),
    Row(f"{BLOCK}.input_layernorm", f"{BLK}.attn_norm", ("embedding",), bias=True),
    Row(f"{BLOCK}.attention.query_key_value", f"{BLK}.attn_qkv", ("qkv_rows", "embedding"), rows=_qkv,
        bias="attention_bias"),
    Row(f"{BLOCK}.attention.dense", f"{BLK}.attn_output", ("embedding", "embedding"), bias="attention_bias"),
    Row(f"{BLOCK}.post_attention_layernorm", f"{BLK}.ffn_norm", ("embedding",), bias=True),
    Row(f"{BLOCK}.mlp.dense_h_to_4h", f"{BLK}.ffn_up", ("feed_forward", "embedding"), bias=True),
    Row(f"{BLOCK}.mlp.dense_4h_to_h", f"{BLK}.ffn_down", ("embedding", "feed_forward"), bias=True),
)  # fmt: skip


def hyperparameters(config: Config) -> dict[str, Any]:
    head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "rope.dimension_count": int(full_rope(config)["partial_rotary_factor"] * head),
        "attention.head_count": config["num_attention_heads"],
        "use_parallel_residual": bool(config["use_parallel_residual"]),
        "attention.layer_norm_epsilon": float(config["layer_norm_eps"]),
        **theta_unless_usual(config),
    }


FAMILY = Family(
    "gptneox",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25,
        "use_parallel_residual": True, "attention_bias": True,
    },
    # no key of this model: what a file calls so says nothing about it
    derived=lambda config: {"num_key_value_heads": config["num_attention_heads"]},
    derived_wins=True,
    aliases={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    activations=("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh"),
    fixed={"attention_bias": True, "tie_word_embeddings": False},
    problems=rope_type_problems("default"),
    ignored=(*IGNORED, r".*\.attention\.rotary_emb\..*"),
    modules={"lm_head.": "embed_out."},
)  # fmt: skip
