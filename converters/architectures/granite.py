"""Granite 3: Llama with four factors. llama.cpp: src/models/granite.cpp; its converter: conversion/granite.py."""

from __future__ import annotations

from typing import Any

from converters.architectures import llama
from converters.architectures.family import Config, Family
from converters.architectures.settings import llama3_factors
from converters.architectures.stored import Stored
from converters.tokenizer_rules import LLAMA_RULES

FACTORS = (
    ("attention.scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
)


def hyperparameters(config: Config) -> dict[str, Any]:
    values = llama.hyperparameters({key: value for key, value in config.items() if key != "head_dim"})
    return values | {key: float(config[name]) for key, name in FACTORS if config.get(name)}


def problems(config: Config) -> list[str]:
    usual = config["hidden_size"] // config["num_attention_heads"]
    own = [] if config.get("head_dim", usual) == usual else [f"head_dim is {config['head_dim']}, expected {usual}"]
    return [*own, *llama.problems(config)]


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    return {name: stored[key] for key, name in FACTORS if stored[key] is not None}


FAMILY = Family(
    "granite",
    llama.DENSE,
    hyperparameters,
    defaults={**llama.DEFAULTS, **{name: 1.0 for _, name in FACTORS}},
    kinds={
        "attention_multiplier": "number?",
        "embedding_multiplier": "number?",
        "residual_multiplier": "number?",
        "logits_scaling": "number?",
    },
    problems=problems,
    restored=restored,
    computed=llama3_factors,
    tokenizer=LLAMA_RULES,
)
