"""Phi-3, Phi-3.5 and Phi-4-mini: q, k and v in one matrix, gate and up in another, which llama.cpp takes as they are.

llama.cpp: src/models/phi3.cpp; its converter: conversion/phi.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.architectures.blocks import BLK, LAYER, embeddings, fused_mlp, norm
from converters.architectures.family import Config, Family, Row
from converters.architectures.settings import (
    common,
    full_rope,
    is_number,
    rope_type_problems,
    usual_head_dim,
    window_notices,
)
from converters.architectures.stored import Stored
from converters.tokenizer_rules import PHI_3_RULES

LONG_ROPES = ("longrope", "su")
ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    Row(f"{LAYER}.self_attn.qkv_proj", f"{BLK}.attn_qkv", ("qkv_rows", "embedding")),
    Row(f"{LAYER}.self_attn.o_proj", f"{BLK}.attn_output", ("embedding", "o_columns")),
    norm("post_attention_layernorm", "ffn_norm"),
    *fused_mlp(),
)


def rotary_dim(config: Config) -> int:
    share = full_rope(config).get("partial_rotary_factor", 1.0)
    return int(share * config["hidden_size"]) // int(config["num_attention_heads"])


def old_context(config: Config) -> int:
    return int(full_rope(config)["original_max_position_embeddings"])


def stretched_by(config: Config) -> float:
    return float(config["max_position_embeddings"] / old_context(config))


def attention_factor(config: Config) -> float:
    stretch = stretched_by(config)
    return math.sqrt(1 + math.log(stretch) / math.log(old_context(config))) if stretch > 1 else 1.0


def hyperparameters(config: Config) -> dict[str, Any]:
    rope = full_rope(config)
    values = {key: value for key, value in common(config).items() if not key.startswith("rope.")}
    values |= {
        "rope.scaling.original_context_length": old_context(config),
        "rope.dimension_count": rotary_dim(config),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.sliding_window": config.get("sliding_window") or 0,  # 0 tells Phi-4 from the others
    }
    if rope["rope_type"] in LONG_ROPES:
        values["rope.scaling.attn_factor"] = attention_factor(config)
    return values


def computed(config: Config) -> dict[str, npt.NDArray[np.float32]]:
    rope = full_rope(config)
    if rope["rope_type"] not in LONG_ROPES:
        return {}
    return {f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32) for name in ("long", "short")}


def problems(config: Config) -> list[str]:
    rope = full_rope(config)
    found = [*usual_head_dim(config), *rope_type_problems("default", *LONG_ROPES)(config)]
    given = {key: rope[key] for key in ("factor", "attention_factor") if rope.get(key) is not None}
    if rope["rope_type"] in LONG_ROPES and old_context(config) < 2:
        return [*found, f"original_max_position_embeddings is {old_context(config)}"]
    if rope["rope_type"] in LONG_ROPES:
        usual = {"factor": stretched_by(config), "attention_factor": attention_factor(config)}
        found += [
            f"{key} of the rotary embedding is {value}, and llama.cpp's converter takes {usual[key]}"
            for key, value in given.items()
            if not (is_number(value) and math.isclose(value, usual[key], rel_tol=1e-6))
        ]
    size = rotary_dim(config) // 2
    for name in ("long_factor", "short_factor") if rope["rope_type"] in LONG_ROPES else ():
        factors = rope.get(name)
        if not isinstance(factors, list) or len(factors) != size or not all(map(is_number, factors)):
            found.append(f"{name} is {factors!r}, expected a list of {size} numbers")
    return found


def notices(config: Config) -> list[str]:
    rope = full_rope(config)
    long = (
        f"rotary factors: transformers takes the long ones from token {old_context(config) + 1} on, llama.cpp from the "
        f"first where it is opened with room for more than {old_context(config)}: equal where both take the same"
    )
    return [*window_notices(config), *([long] if rope["rope_type"] in LONG_ROPES else [])]


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    old = stored["rope.scaling.original_context_length"]
    rope = {**found["rope_parameters"]}
    if stored.has("rope_factors_long.weight"):
        rope |= {f"{name}_factor": stored.floats(f"rope_factors_{name}.weight") for name in ("long", "short")}
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": old}
    return {
        "sliding_window": stored["attention.sliding_window"] or None,
        "original_max_position_embeddings": old,
        "rope_parameters": rope,
    }


FAMILY = Family(
    "phi3",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 1.0,
    },
    fixed={"attention_bias": False},
    kinds={"sliding_window": "whole?"},
    problems=problems,
    restored=restored,
    notices=notices,
    computed=computed,
    tokenizer=PHI_3_RULES,
)  # fmt: skip
