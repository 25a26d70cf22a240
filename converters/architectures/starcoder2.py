"""StarCoder2. llama.cpp: src/models/starcoder2.cpp; its converter: conversion/starcoder.py."""

from __future__ import annotations

from converters.architectures.blocks import BLK, LAYER, attention, embeddings, norm
from converters.architectures.family import Config, Family, Row
from converters.architectures.settings import common, rope_type_problems, usual_head_dim, whole_rope, window_notices

ROWS = (
    *embeddings(bias=True),
    norm("input_layernorm", "attn_norm", bias=True),
    *attention(bias="use_bias", output_bias="use_bias"),
    norm("post_attention_layernorm", "ffn_norm", bias=True),
    Row(f"{LAYER}.mlp.c_fc", f"{BLK}.ffn_up", ("feed_forward", "embedding"), bias="use_bias"),
    Row(f"{LAYER}.mlp.c_proj", f"{BLK}.ffn_down", ("embedding", "feed_forward"), bias="use_bias"),
)


def problems(config: Config) -> list[str]:
    return [*usual_head_dim(config), *rope_type_problems("default", "linear", "yarn")(config), *whole_rope(config)]


FAMILY = Family(
    "starcoder2",
    ROWS,
    common,
    defaults={
        "max_position_embeddings": 4096, "norm_epsilon": 1e-5, "num_key_value_heads": 2, "use_bias": True,
        "tie_word_embeddings": True,
    },
    fixed={"use_bias": True},
    activations=("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    problems=problems,
    notices=window_notices,
)  # fmt: skip
