"""Falcon 7B and 40B. llama.cpp: src/models/falcon.cpp; its converter: conversion/falcon.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import BLK
from converters.architectures.family import Config, Family, Indices, Row, grouped_rows
from converters.architectures.settings import rope_type_problems, theta_unless_usual, whole_rope
from converters.architectures.sizes import Sizes
from converters.architectures.stored import Stored

BLOCK = "transformer.h.{layer}"
CONTEXT = 2048  # what its converter writes, whatever the configuration says


def _qkv(sizes: Sizes) -> Indices:
    """A checkpoint has, for each head of k and v, the heads of q that share it, then k, then v."""
    dim = sizes["head_dim"]
    return grouped_rows(sizes["heads_kv"], (sizes["heads"] // sizes["heads_kv"] * dim, dim, dim), (0, 1, 2))


def has_two_norms(config: Config, layer: int | None) -> bool:
    return bool(config["new_decoder_architecture"]) and config.get("num_ln_in_parallel_attn", 2) == 2


def has_one_norm(config: Config, layer: int | None) -> bool:
    return not has_two_norms(config, layer)


ROWS = (
    Row("transformer.word_embeddings", "token_embd", ("vocab", "embedding")),
    Row("transformer.ln_f", "output_norm", ("embedding",), bias=True),
    Row("lm_head", "output", ("vocab", "embedding"), absent_if_tied=True),
    Row(f"{BLOCK}.input_layernorm", f"{BLK}.attn_norm", ("embedding",), bias=True, when=has_one_norm),
    Row(f"{BLOCK}.ln_mlp", f"{BLK}.attn_norm", ("embedding",), bias=True, when=has_two_norms),
    Row(f"{BLOCK}.ln_attn", f"{BLK}.attn_norm_2", ("embedding",), bias=True, when=has_two_norms),
    Row(f"{BLOCK}.self_attention.query_key_value", f"{BLK}.attn_qkv", ("qkv_rows", "embedding"), rows=_qkv),
    Row(f"{BLOCK}.self_attention.dense", f"{BLK}.attn_output", ("embedding", "embedding")),
    Row(f"{BLOCK}.mlp.dense_h_to_4h", f"{BLK}.ffn_up", ("feed_forward", "embedding")),
    Row(f"{BLOCK}.mlp.dense_4h_to_h", f"{BLK}.ffn_down", ("embedding", "feed_forward")),
)


def hyperparameters(config: Config) -> dict[str, Any]:
    return {
        "context_length": CONTEXT,
        "tensor_data_layout": "jploski",
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        **theta_unless_usual(config),
    }


def derived(config: Config) -> dict[str, Any]:
    """Heads of k and v as transformers counts them (`FalconAttention`)."""
    heads = config["num_attention_heads"]
    shared = config.get("num_kv_heads") or heads if config["new_decoder_architecture"] else 1
    heads_kv = shared if config["new_decoder_architecture"] or config["multi_query"] else heads
    return {"num_key_value_heads": heads_kv,
            "intermediate_size": config.get("ffn_hidden_size") or 4 * config["hidden_size"]}  # fmt: skip


def problems(config: Config) -> list[str]:
    size = config["intermediate_size"]
    own = [] if size == 4 * config["hidden_size"] else [f"ffn_hidden_size is {size}, expected 4 times hidden_size"]
    if not config["new_decoder_architecture"] and not config["multi_query"]:
        own.append("multi_query is False in the old architecture, whose q, k and v llama.cpp does not know")
    return [*own, *rope_type_problems("default")(config), *whole_rope(config)]


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    two_norms = stored.has("blk.{layer}.attn_norm_2.weight")
    return {
        "num_kv_heads": found["num_key_value_heads"],
        "ffn_hidden_size": found["intermediate_size"],
        "new_decoder_architecture": two_norms or found["num_key_value_heads"] > 1,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "multi_query": True,
    }


FAMILY = Family(
    "falcon",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": CONTEXT, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "new_decoder_architecture": False, "multi_query": True,
    },
    derived=derived,
    derived_wins=True,
    aliases={"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads",
             "n_embed": "hidden_size"},
    activations=("gelu",),
    fixed={"alibi": False, "parallel_attn": True, "bias": False},
    kinds={"num_kv_heads": "whole?", "ffn_hidden_size": "whole?"},
    problems=problems,
    restored=restored,
)  # fmt: skip
