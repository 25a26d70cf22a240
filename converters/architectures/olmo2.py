"""OLMo 2 and OLMo 3: norms after attention and MLP. llama.cpp: src/models/olmo2.cpp; converter: conversion/olmo.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import attention, embeddings, gated_mlp, head_norms, norm
from converters.architectures.family import Config, Family
from converters.architectures.settings import (
    common,
    is_number,
    restored_windows,
    rope_type_problems,
    sliding_layers,
    usual_head_dim,
    whole_rope,
)

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
    if config.get("layer_types") and config.get("sliding_window"):  # OLMo 3
        values["attention.sliding_window"] = config["sliding_window"]
        values["attention.sliding_window_pattern"] = sliding_layers(config)
    return values


def layer_types(config: Config, interval: int = INTERVAL) -> list[str]:
    layers = range(config["num_hidden_layers"])
    return ["full_attention" if (n + 1) % interval == 0 else "sliding_attention" for n in layers]


def problems(config: Config) -> list[str]:
    return [*usual_head_dim(config), *rope_type_problems("default", "linear", "yarn")(config), *whole_rope(config)]


def problems_of_windows(config: Config) -> list[str]:
    ropes, window = config["rope_parameters"], config.get("sliding_window")
    thetas = {float(rope["rope_theta"]) for rope in ropes.values()} if "sliding_attention" in ropes else set()
    checks = (
        (is_number(window), f"sliding_window is {window!r}, expected a number"),
        (len(thetas) < 2, f"layers have rope_theta {thetas} (without one: 500000), and llama.cpp takes one for all"),
    )
    return [*(problem for ok, problem in checks if not ok), *problems(config)]


FAMILY = Family(
    "olmo2",
    ROWS,
    hyperparameters,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    # llama.cpp wants an output of its own
    fixed={"attention_bias": False, "tie_word_embeddings": False, "sliding_window": None},
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
    derived=lambda config: {"layer_types": layer_types(config)},
    fixed={"attention_bias": False, "tie_word_embeddings": False},
    kinds={"sliding_window": "whole?"},
    problems=problems_of_windows,
    restored=restored_windows,
)  # fmt: skip
