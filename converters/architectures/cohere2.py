"""Command-R7B: three layers that see a window, then one that sees all. llama.cpp: src/models/cohere2.cpp."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import attention, embeddings, gated_mlp, norm
from converters.architectures.family import Config, Family
from converters.architectures.olmo2 import INTERVAL, layer_types
from converters.architectures.settings import (
    common,
    rope_type_problems,
    rotary_dim,
    usual_head_dim,
    whole_rope,
)
from converters.architectures.stored import Stored

ROWS = (*embeddings()[:2], norm("input_layernorm", "attn_norm"), *attention(), *gated_mlp())


def hyperparameters(config: Config) -> dict[str, Any]:
    return {
        **common(config),
        "logit_scale": float(config["logit_scale"]),
        "attention.sliding_window": config["sliding_window"],
        "vocab_size": config["vocab_size"],
        "rope.dimension_count": rotary_dim(config),
        "rope.scaling.type": "none",
    }


def derived(config: Config) -> dict[str, Any]:
    interval = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", INTERVAL))
    return {"layer_types": layer_types(config, interval)}


def problems(config: Config) -> list[str]:
    pattern = layer_types(config, INTERVAL)
    own = [] if config["layer_types"] == pattern else ["layer_types: llama.cpp's cohere2 sees all in every 4th layer"]
    return [*own, *usual_head_dim(config), *rope_type_problems("default")(config), *whole_rope(config)]


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    return {"logit_scale": stored["logit_scale"]}


FAMILY = Family(
    "cohere2",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    fills_head_dim=True,
    derived=derived,
    aliases={"rotary_pct": "partial_rotary_factor"},
    fixed={"attention_bias": False},
    kinds={"sliding_window": "whole", "sliding_window_pattern": "whole?", "logit_scale": "number"},
    problems=problems,
    restored=restored,
)  # fmt: skip
