"""Mistral Small 3.1 and later with vision (their text model), and Ministral 3.

llama.cpp: src/models/mistral3.cpp; its converter: conversion/mistral3.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from converters.architectures import llama
from converters.architectures.family import Config
from converters.architectures.settings import full_rope, is_number, whole_rope, yarn_scale, yarn_scale_problems
from converters.architectures.stored import Stored

SMALL = replace(llama.MISTRAL, architecture="mistral3")
"""Llama's tensors and settings; what is inside decides, not what is around it."""


def hyperparameters(config: Config) -> dict[str, Any]:
    rope = full_rope(config)
    return llama.hyperparameters(config) | {
        "rope.scaling.yarn_log_multiplier": float(rope["mscale_all_dim"]),
        "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
    }


def problems(config: Config) -> list[str]:
    rope = full_rope(config)
    missing = [name for name in ("mscale_all_dim", "llama_4_scaling_beta") if not is_number(rope.get(name))]
    own = [f"rope_parameters lack {', '.join(missing)}"] if missing else []
    yarn = [] if rope["rope_type"] == "yarn" else [f"rope_type is {rope['rope_type']!r}, expected 'yarn'"]
    if own or yarn:
        return [*own, *yarn]
    # without its own `mscale` (src/llama-context.cpp)
    wanted = yarn_scale(rope["factor"], 1.0) / yarn_scale(rope["factor"], rope["mscale_all_dim"])
    return [*yarn_scale_problems(rope, wanted), *whole_rope(config)]


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    own = {
        "mscale": 1.0,
        "mscale_all_dim": stored["rope.scaling.yarn_log_multiplier"],
        "llama_4_scaling_beta": stored["attention.temperature_scale"],
    }
    return {"rope_parameters": {**found["rope_parameters"], **own}}


MINISTRAL = replace(
    SMALL,
    restored=restored,
    hyperparameters=hyperparameters,
    problems=problems,
    defaults={
        **SMALL.defaults, "max_position_embeddings": 262144, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    },
)  # fmt: skip
