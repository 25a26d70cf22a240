"""Command-R, Command-R+ and Aya. llama.cpp: src/models/command-r.cpp; its converter: conversion/command_r.py."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import attention, embeddings, gated_mlp, head_norms, norm, where
from converters.architectures.family import Config, Family
from converters.architectures.settings import common, rope_type_problems, usual_head_dim, whole_rope
from converters.architectures.stored import Stored

ROWS = (
    *embeddings()[:2],  # always tied
    norm("input_layernorm", "attn_norm"),
    *attention(),
    *head_norms(q=("heads", "head_dim"), k=("heads_kv", "head_dim"), when=where("use_qk_norm")),
    *gated_mlp(),
)


def hyperparameters(config: Config) -> dict[str, Any]:
    # The files say 8192; the models were trained on more, which `model_max_length` says.
    context = config.get("model_max_length") or config["max_position_embeddings"]
    return {
        **common(config),
        "context_length": context,
        "logit_scale": float(config["logit_scale"]),
        "rope.scaling.type": "none",
    }


LAYERS_WITH_NORMS = 64  # from how many layers llama.cpp expects norms of q and k (src/models/command-r.cpp)


def problems(config: Config) -> list[str]:
    wanted = config["num_hidden_layers"] >= LAYERS_WITH_NORMS
    own = [] if bool(config.get("use_qk_norm")) == wanted else [
        f"use_qk_norm is {config.get('use_qk_norm', False)}, and llama.cpp expects {wanted} at this number of layers"
    ]  # fmt: skip
    return [*own, *usual_head_dim(config), *rope_type_problems("default")(config), *whole_rope(config)]


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    return {"logit_scale": stored["logit_scale"], "use_qk_norm": stored.has("blk.{layer}.attn_q_norm.weight")}


FAMILY = Family(
    "command-r",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "rope_theta": 500000.0, "logit_scale": 0.0625,
        "tie_word_embeddings": True,
    },
    fixed={"attention_bias": False},
    kinds={"model_max_length": "whole?", "logit_scale": "number"},
    problems=problems,
    restored=restored,
)  # fmt: skip
