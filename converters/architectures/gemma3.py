"""Gemma 3, the text model. llama.cpp: src/models/gemma3.cpp; its converter: conversion/gemma.py."""

from __future__ import annotations

from typing import Any

from converters.architectures import gemma
from converters.architectures.blocks import attention, embeddings, gated_mlp, head_norms
from converters.architectures.family import PLUS_ONE, Config, Family
from converters.architectures.gemma2 import NORMS
from converters.architectures.settings import common, full_rope, head_dim, is_number, rope_type_problems, whole_rope
from converters.architectures.stored import Stored
from converters.tokenizer_rules import GEMMA_RULES

INTERVAL = 6
LAYERS_OF_27B = 62
ROWS = (
    *embeddings(norm_value=PLUS_ONE),
    *NORMS,
    *attention(),
    *head_norms(value=PLUS_ONE),
    *gated_mlp(),
)


def hyperparameters(config: Config) -> dict[str, Any]:
    values = {**common(config), "attention.sliding_window": config["sliding_window"]}
    if config.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return values


def derived(config: Config) -> dict[str, Any]:
    interval = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", INTERVAL))
    kinds = ["full_attention" if (n + 1) % interval == 0 else "sliding_attention"
             for n in range(config["num_hidden_layers"])]  # fmt: skip
    return {"layer_types": kinds}


def problems(config: Config) -> list[str]:
    layers = config["num_hidden_layers"]
    wanted = config["hidden_size"] // config["num_attention_heads"] if layers == LAYERS_OF_27B else head_dim(config)
    scalar = config.get("query_pre_attn_scalar", wanted)
    pattern = derived({"num_hidden_layers": layers})["layer_types"]
    checks = (
        (is_number(config.get("sliding_window")), f"sliding_window is {config.get('sliding_window')!r}"),
        (scalar == wanted, f"query_pre_attn_scalar is {scalar}, and llama.cpp's gemma3 takes {wanted}"),
        (config["layer_types"] == pattern, f"layer_types: llama.cpp's gemma3 has full attention in every {INTERVAL}th"),
        (not config.get("attn_logit_softcapping"), "attn_logit_softcapping, which llama.cpp's gemma3 has not"),
        (full_rope(config)["rope_theta"] > 0, "rope_theta"),
    )
    ropes = [*rope_type_problems("default", "linear")(config), *whole_rope(config)]
    return [*(problem for ok, problem in checks if not ok), *ropes]


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    is_27b = found["num_hidden_layers"] == LAYERS_OF_27B
    usual = found["hidden_size"] // found["num_attention_heads"]
    return {"query_pre_attn_scalar": usual if is_27b else found.get("head_dim", usual)}


FAMILY = Family(
    "gemma3",
    ROWS,
    hyperparameters,
    defaults={
        **gemma.DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 4, "num_attention_heads": 8,
        "sliding_window": 4096, "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "vocab_size": 262208,
    },
    derived=derived,
    activations=gemma.GELU,
    fixed={"attention_bias": False, "use_bidirectional_attention": False},
    kinds={
        "sliding_window": "whole", "sliding_window_pattern": "whole?", "_sliding_window_pattern": "whole?",
        "final_logit_softcapping": "number?",
    },
    problems=problems,
    restored=restored,
    ignored=gemma.FAMILY.ignored,
    tokenizer=GEMMA_RULES,
)  # fmt: skip
