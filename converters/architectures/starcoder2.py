"""StarCoder2. llama.cpp: src/models/starcoder2.cpp; its converter: conversion/starcoder.py."""

from __future__ import annotations

from converters.architectures.blocks import BLK, LAYER, attention, embeddings, norm
from converters.architectures.family import Config, Family, Row
from converters.architectures.settings import common, rope_type_problems, whole_rope

ROWS = (
    *embeddings(bias=True),
    norm("input_layernorm", "attn_norm", bias=True),
    *attention(bias="use_bias", output_bias="use_bias"),
    norm("post_attention_layernorm", "ffn_norm", bias=True),
    Row(f"{LAYER}.mlp.c_fc", f"{BLK}.ffn_up", ("feed_forward", "embedding"), bias="use_bias"),
    Row(f"{LAYER}.mlp.c_proj", f"{BLK}.ffn_down", ("embedding", "feed_forward"), bias="use_bias"),
)


def problems(config: Config) -> list[str]:
    return [*rope_type_problems("default", "linear", "yarn")(config), *whole_rope(config)]


def notices(config: Config) -> list[str]:
    window = config.get("sliding_window")
    if isinstance(window, int) and window < config["max_position_embeddings"]:
        return [f"sliding_window {window} is not applied by llama.cpp: equal up to {window} tokens of context"]
    return []


FAMILY = Family(
    "starcoder2",
    ROWS,
    common,
    defaults={
        "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "num_key_value_heads": 2, "use_bias": True,
        "tie_word_embeddings": True,
    },
    activations=("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    problems=problems,
    notices=notices,
)  # fmt: skip
