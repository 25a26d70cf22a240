"""Gemma 2. llama.cpp: src/models/gemma2.cpp; its converter: conversion/gemma.py."""

from __future__ import annotations

from typing import Any

from converters.architectures import gemma
from converters.architectures.blocks import attention, embeddings, gated_mlp, norm
from converters.architectures.family import PLUS_ONE, Config, Family
from converters.architectures.settings import head_dim, is_number
from converters.architectures.stored import Stored
from converters.tokenizer_rules import GEMMA_RULES

NORMS = (
    norm("input_layernorm", "attn_norm", value=PLUS_ONE),
    norm("post_attention_layernorm", "post_attention_norm", value=PLUS_ONE),
    norm("pre_feedforward_layernorm", "ffn_norm", value=PLUS_ONE),
    norm("post_feedforward_layernorm", "post_ffw_norm", value=PLUS_ONE),
)
ROWS = (*embeddings(norm_value=PLUS_ONE)[:2], *NORMS, *attention(), *gated_mlp())
LAYERS_OF_27B = 46


def hyperparameters(config: Config) -> dict[str, Any]:
    return gemma.plain(config) | {
        "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
        "attention.sliding_window": config["sliding_window"],
    }


def problems(config: Config) -> list[str]:
    layers = config["num_hidden_layers"]
    # What llama.cpp divides q by, root of it (load_arch_hparams of gemma2, src/models/gemma2.cpp)
    wanted = config["hidden_size"] // config["num_attention_heads"] if layers == LAYERS_OF_27B else head_dim(config)
    scalar = config.get("query_pre_attn_scalar", wanted)
    pattern = ["sliding_attention" if n % 2 == 0 else "full_attention" for n in range(layers)]
    checks = (
        *(
            (is_number(config.get(key)), f"{key} is {config.get(key)!r}, and llama.cpp's gemma2 wants a number")
            for key in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
        ),
        (scalar == wanted, f"query_pre_attn_scalar is {scalar}, and llama.cpp's gemma2 takes {wanted}"),
        (config.get("layer_types", pattern) == pattern, "layer_types do not alternate, as llama.cpp's gemma2 does"),
    )
    return [*(problem for ok, problem in checks if not ok), *gemma.problems(config)]


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    is_27b = found["num_hidden_layers"] == LAYERS_OF_27B
    usual = found["hidden_size"] // found["num_attention_heads"]
    return {"query_pre_attn_scalar": usual if is_27b else found.get("head_dim", usual)}


FAMILY = Family(
    "gemma2",
    ROWS,
    hyperparameters,
    defaults={
        **gemma.DEFAULTS, "num_key_value_heads": 4, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    activations=gemma.GELU,
    fixed={"attention_bias": False, "use_bidirectional_attention": False},
    kinds={"sliding_window": "whole", "attn_logit_softcapping": "number", "final_logit_softcapping": "number"},
    problems=problems,
    restored=restored,
    ignored=gemma.FAMILY.ignored,
    tokenizer=GEMMA_RULES,
)  # fmt: skip
