"""OLMo 2 and OLMo 3: norms after attention and MLP. llama.cpp: src/models/olmo2.cpp; converter: conversion/olmo.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import attention, embeddings, gated_mlp, head_norms, norm
from converters.architectures.family import Config, Family
from converters.architectures.settings import common, rope_type_problems, sliding_layers, whole_rope

ROWS = (
    *embeddings(),
    *attention(),
    *head_norms(q=("q_rows",), k=("kv_rows",)),
    norm("post_attention_layernorm", "post_attention_norm"),
    norm("post_feedforward_layernorm", "post_ffw_norm"),
    *gated_mlp(),
)
INTERVAL = 4


def hyperparameters(config: Config) -> dict[str, Any]:
    values = common(config)
    if config.get("sliding_window"):
        values["attention.sliding_window"] = config["sliding_window"]
        values["attention.sliding_window_pattern"] = sliding_layers(config)
    return values


def layer_types(config: Config) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    return {"layer_types": ["full_attention" if (n + 1) % INTERVAL == 0 else "sliding_attention" for n in layers]}


def problems(config: Config) -> list[str]:
    return [*rope_type_problems("default", "linear", "yarn")(config), *whole_rope(config)]


FAMILY = Family(
    "olmo2",
    ROWS,
    hyperparameters,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    fixed={"attention_bias": False},
    problems=problems,
)
OLMO3 = Family(
    "olmo2",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096,
        "rope_local_base_freq": 500000.0,
    },
    derived=layer_types,
    fixed={"attention_bias": False},
    problems=problems,
)  # fmt: skip
