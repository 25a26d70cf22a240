"""gpt-oss: experts stored as MXFP4 blocks, or in 16 bits.

llama.cpp: src/models/openai-moe.cpp; its converter: conversion/gpt_oss.py.
"""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import BLK, LAYER, attention, embeddings, norm
from converters.architectures.family import Config, Family, Indices, Order, Row, every_second
from converters.architectures.settings import common, full_rope, is_number, rope_type_problems, whole_rope
from converters.architectures.sizes import Sizes

EXPERTS = f"{LAYER}.mlp.experts"
WIDE, TALL = ("experts", "expert_feed_forward", "embedding"), ("experts", "embedding", "expert_feed_forward")
BLOCKS_END = ("_blocks", ".weight")
FUSED = ("experts", "embedding", "two_expert_feed_forward")


def _rows(first: int) -> Order:
    """gate and up are stored in turns."""

    def rows(sizes: Sizes) -> Indices:
        return every_second(sizes["experts"] * 2 * sizes["expert_feed_forward"], first)

    return rows


def _columns(first: int) -> Order:
    def columns(sizes: Sizes) -> Indices:
        return every_second(2 * sizes["expert_feed_forward"], first)

    return columns


def _gate_or_up(name: str, first: int) -> tuple[Row, ...]:
    hf, gguf = f"{EXPERTS}.gate_up_proj", f"{BLK}.ffn_{name}_exps"
    return (
        Row(hf, gguf, WIDE, rows=_rows(first), mxfp4=True, ends=BLOCKS_END,
            hf_shape=("experts", "two_expert_feed_forward", "embedding")),
        Row(hf, gguf, WIDE, rows=_rows(first), hf_shape=FUSED, transposed=True, ends=("", ".weight")),
        Row(f"{hf}_bias", gguf, ("experts", "expert_feed_forward"), columns=_columns(first),
            hf_shape=("experts", "two_expert_feed_forward"), ends=("", ".bias")),
    )  # fmt: skip


ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *attention(bias="attention_bias", output_bias="attention_bias"),
    Row(f"{LAYER}.self_attn.sinks", f"{BLK}.attn_sinks", ("heads",), ends=("", ".weight")),
    norm("post_attention_layernorm", "post_attention_norm"),
    Row(f"{LAYER}.mlp.router", f"{BLK}.ffn_gate_inp", ("experts", "embedding"), bias=True),
    *_gate_or_up("gate", 0),
    *_gate_or_up("up", 1),
    Row(f"{EXPERTS}.down_proj", f"{BLK}.ffn_down_exps", TALL, mxfp4=True, ends=BLOCKS_END),
    Row(f"{EXPERTS}.down_proj", f"{BLK}.ffn_down_exps", TALL, transposed=True, ends=("", ".weight")),
    Row(f"{EXPERTS}.down_proj_bias", f"{BLK}.ffn_down_exps", ("experts", "embedding"), ends=("", ".bias")),
)


def hyperparameters(config: Config) -> dict[str, Any]:
    return {
        **common(config),
        "attention.sliding_window": config["sliding_window"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


def layer_types(config: Config) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    return {"layer_types": ["full_attention" if n % 2 else "sliding_attention" for n in layers]}


def problems(config: Config) -> list[str]:
    pattern = layer_types(config)["layer_types"]
    own = [] if config["layer_types"] == pattern else ["layer_types do not alternate, as llama.cpp's gpt-oss does"]
    window = config.get("sliding_window")
    own += [] if is_number(window) else [f"sliding_window is {window!r}, expected a number"]
    return [*own, *rope_type_problems("default", "yarn")(config), *whole_rope(config)]


def notices(config: Config) -> list[str]:
    if full_rope(config).get("truncate", True):
        return []
    return [
        "rope_parameters: truncate is false, and llama.cpp rounds where YaRN begins and ends: logits differ a little"
    ]


FAMILY = Family(
    "gpt-oss",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "head_dim": 64,
        "num_key_value_heads": 8, "sliding_window": 128, "num_experts": 128, "num_experts_per_tok": 4,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": False,
        },
    },
    derived=layer_types,
    aliases={"num_local_experts": "num_experts"},
    fixed={"attention_bias": True, "tie_word_embeddings": False, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    kinds={"sliding_window": "whole"},
    problems=problems,
    notices=notices,
)  # fmt: skip
