"""EXAONE 4.0. llama.cpp: src/models/exaone4.cpp; its converter: conversion/exaone.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import attention, embeddings, gated_mlp, head_norms, norm
from converters.architectures.family import Config, Family
from converters.architectures.settings import (
    common,
    is_whole,
    llama3_factors,
    restored_windows,
    rope_type_problems,
    sliding_layers,
    whole_rope,
)

ROWS = (
    *embeddings(),
    *attention(),
    *head_norms(),
    norm("post_attention_layernorm", "post_attention_norm"),
    norm("post_feedforward_layernorm", "post_ffw_norm"),
    *gated_mlp(),
)


def hyperparameters(config: Config) -> dict[str, Any]:
    values = {**common(config), "vocab_size": config["vocab_size"]}
    if config.get("sliding_window"):
        values["attention.sliding_window"] = config["sliding_window"]
        values["attention.sliding_window_pattern"] = sliding_layers(config)
    return values


def layer_types(config: Config) -> dict[str, Any]:
    """From `sliding_window_pattern`: 4 is three layers with a window and one without, as is "LLLG"."""
    pattern, layers = config.get("sliding_window_pattern"), range(config["num_hidden_layers"])
    if not config.get("sliding_window") or not pattern:
        local = [False for _ in layers]
    elif isinstance(pattern, str):
        local = [pattern[n % len(pattern)] == "L" for n in layers]
    else:
        local = [is_whole(pattern) and (n + 1) % pattern != 0 for n in layers]
    return {"layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in local]}


LAYERS_OF_32B = 64  # the one size whose windows llama.cpp knows (src/models/exaone4.cpp)


def problems(config: Config) -> list[str]:
    is_32b, layers = config["num_hidden_layers"] == LAYERS_OF_32B, range(config["num_hidden_layers"])
    pattern = [is_32b and (n + 1) % 4 != 0 for n in layers]
    usual = config["hidden_size"] // config["num_attention_heads"]
    window = config.get("sliding_window_pattern")
    checks = (
        (
            not window or is_whole(window) or isinstance(window, str),  # 0: without windows
            f"sliding_window_pattern is {window!r}, expected a number of layers, or a letter for each",
        ),
        (config.get("head_dim", usual) == usual, f"head_dim is {config.get('head_dim')}, and llama.cpp takes {usual}"),
        (
            sliding_layers(config) == pattern,
            f"layers with a sliding window: llama.cpp's exaone4 has them in three of four of {LAYERS_OF_32B} layers, "
            "and in no other size",
        ),
    )
    own = [problem for ok, problem in checks if not ok]
    return [*own, *rope_type_problems("default", "linear", "yarn", "llama3")(config), *whole_rope(config)]


FAMILY = Family(
    "exaone4",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    derived=layer_types,
    kinds={"sliding_window": "whole?"},
    problems=problems,
    restored=restored_windows,
    computed=llama3_factors,
)  # fmt: skip
