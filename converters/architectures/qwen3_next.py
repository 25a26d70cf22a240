"""Qwen3-Next: layers of linear attention (gated delta nets), and one in four of full attention.

llama.cpp: src/models/qwen3next.cpp; its converter: conversion/qwen.py. Layers beyond `num_hidden_layers` predict
further tokens; checkpoints name them `mtp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from converters.architectures.blocks import BLK, LAYER, attention, embeddings, experts, head_norms, norm, shared_expert
from converters.architectures.family import MINUS_EXP, PLUS_ONE, Config, Family, Indices, Order, Row, grouped_rows
from converters.architectures.qwen2_moe import EVERY_LAYER
from converters.architectures.qwen2_moe import hyperparameters as mixture
from converters.architectures.settings import rope_type_problems, rotary_dim
from converters.architectures.sizes import Sizes
from converters.architectures.stored import Stored

INTERVAL = 4
LINEAR = f"{LAYER}.linear_attn"
_MTP_MODULES = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm",
                "norm": "shared_head.norm"}  # fmt: skip


def is_linear(config: Config, layer: int | None) -> bool:
    types = config["layer_types"]
    return layer is not None and layer < len(types) and types[layer] == "linear_attention"


def is_full(config: Config, layer: int | None) -> bool:
    return not is_linear(config, layer)


def is_predicting(config: Config, layer: int | None) -> bool:
    return layer is not None and layer >= config["num_hidden_layers"]


def linear_attention(*, projections: tuple[Row, ...], heads: Order | None = None, rows: Order | None = None,
                     columns: Order | None = None) -> tuple[Row, ...]:  # fmt: skip
    """A gated delta net, but for its input projections; orders where value heads are stored in another order."""
    return (
        *projections,
        Row(f"{LINEAR}.A_log", f"{BLK}.ssm_a", ("value_heads",), rows=heads, value=MINUS_EXP, ends=("", ""),
            when=is_linear),
        Row(f"{LINEAR}.dt_bias", f"{BLK}.ssm_dt", ("value_heads",), rows=heads, ends=("", ".bias"), when=is_linear),
        Row(f"{LINEAR}.conv1d", f"{BLK}.ssm_conv1d", ("conv_rows", "conv_columns"), rows=rows,
            hf_shape=("conv_rows", 1, "conv_columns"), when=is_linear),
        Row(f"{LINEAR}.norm", f"{BLK}.ssm_norm", ("value_head_dim",), when=is_linear),
        Row(f"{LINEAR}.out_proj", f"{BLK}.ssm_out", ("embedding", "value_rows"), columns=columns, when=is_linear),
    )  # fmt: skip


def full_attention() -> tuple[Row, ...]:
    """Full attention whose q is followed, head by head, by a gate."""
    q, *others = attention(when=is_full)
    return (replace(q, shape=("gated_q_rows", "embedding")), *others, *head_norms(value=PLUS_ONE, when=is_full))


PREDICTING = (
    Row(f"{LAYER}.eh_proj", f"{BLK}.nextn.eh_proj", ("embedding", "two_embedding"), when=is_predicting),
    *(norm(hf, f"nextn.{gguf}", value=PLUS_ONE, when=is_predicting)
      for hf, gguf in (("enorm", "enorm"), ("hnorm", "hnorm"), ("shared_head.norm", "shared_head_norm"))),
)  # fmt: skip
NORMS = (
    norm("input_layernorm", "attn_norm", value=PLUS_ONE),
    norm("post_attention_layernorm", "post_attention_norm", value=PLUS_ONE),
)


def _parts(sizes: Sizes) -> tuple[int, ...]:
    """q, k, v and z of one key head."""
    values = sizes["value_rows"] // sizes["key_heads"]
    return (sizes["key_head_dim"], sizes["key_head_dim"], values, values)


def _qkv(sizes: Sizes) -> Indices:
    return grouped_rows(sizes["key_heads"], _parts(sizes), (0, 1, 2))


def _z(sizes: Sizes) -> Indices:
    return grouped_rows(sizes["key_heads"], _parts(sizes), (3,))


PROJECTIONS = (
    Row(f"{LINEAR}.in_proj_qkvz", f"{BLK}.attn_qkv", ("conv_rows", "embedding"), rows=_qkv,
        hf_shape=("qkvz_rows", "embedding"), when=is_linear),
    Row(f"{LINEAR}.in_proj_qkvz", f"{BLK}.attn_gate", ("value_rows", "embedding"), rows=_z,
        hf_shape=("qkvz_rows", "embedding"), when=is_linear),
    Row(f"{LINEAR}.in_proj_ba", f"{BLK}.ssm_ba", ("two_value_heads", "embedding"), when=is_linear),
)  # fmt: skip
ROWS = (
    *embeddings(norm_value=PLUS_ONE),
    *NORMS,
    *linear_attention(projections=PROJECTIONS),
    *full_attention(),
    *experts(),
    *shared_expert(),
    *PREDICTING,
)


def with_linear(values: dict[str, Any], config: Config) -> dict[str, Any]:
    """The keys of linear attention, and of layers that predict further tokens, on top of `values`."""
    extra = config["extra_layers"]
    kinds = [kind == "linear_attention" for kind in config["layer_types"]] + [False] * extra
    return values | {
        "block_count": config["num_hidden_layers"] + extra,
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": config["linear_num_value_heads"],
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "attention.recurrent_layers": kinds,
        "full_attention_interval": config.get("full_attention_interval", INTERVAL),
        "rope.dimension_count": rotary_dim(config),
        **({"nextn_predict_layers": extra} if extra else {}),
    }


def hyperparameters(config: Config) -> dict[str, Any]:
    return with_linear(mixture(config), config)


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    layers = found["num_hidden_layers"] - (stored["nextn_predict_layers"] or 0)
    settings = {
        "num_hidden_layers": layers,
        "full_attention_interval": stored["full_attention_interval"],
        "linear_conv_kernel_dim": stored["ssm.conv_kernel"],
        "linear_key_head_dim": stored["ssm.state_size"],
        "linear_num_key_heads": stored["ssm.group_count"],
        "linear_num_value_heads": stored["ssm.time_step_rank"],
        "linear_value_head_dim": stored["ssm.inner_size"] // stored["ssm.time_step_rank"],
    }
    kinds = stored["attention.recurrent_layers"] or []
    own = {"layer_types": ["linear_attention" if linear else "full_attention" for linear in kinds[:layers]]}
    return settings | (own if kinds else layer_types(settings))


def rename(name: str, config: Config) -> str:
    """`mtp` modules to the layers they are."""
    name = name.removeprefix("model.") if name.startswith("model.mtp.") else name
    if found := re.fullmatch(r"mtp\.layers\.(\d+)\.(.+)", name):
        return f"model.layers.{config['num_hidden_layers'] + int(found[1])}.{found[2]}"
    if found := re.fullmatch(r"mtp\.(\w+)\.(\w+)", name):
        module = _MTP_MODULES.get(found[1], found[1])
        return f"model.layers.{config['num_hidden_layers']}.{module}.{found[2]}"
    return name


def extra_layers(names: Iterable[str]) -> int:
    found = [int(match[1]) for name in names if (match := re.search(r"(?:^|\.)mtp\.layers\.(\d+)\.", name))]
    return max(found, default=-1) + 1


def layer_types(config: Config) -> dict[str, Any]:
    interval = config.get("full_attention_interval", INTERVAL)
    layers = range(config["num_hidden_layers"])
    return {"layer_types": ["full_attention" if (n + 1) % interval == 0 else "linear_attention" for n in layers]}


def problems(config: Config) -> list[str]:
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    uneven = f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}"
    return [*([] if values % keys == 0 else [uneven]), *rope_type_problems("default")(config)]


LINEAR_DEFAULTS = {
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "head_dim": 256, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "partial_rotary_factor": 0.25,
}  # fmt: skip
LINEAR_KINDS = {
    **{name: "whole" for name in LINEAR_DEFAULTS if name.startswith("linear_")}, "full_attention_interval": "whole?",
}  # fmt: skip
FAMILY = Family(
    "qwen3next",
    ROWS,
    hyperparameters,
    defaults={
        **LINEAR_DEFAULTS, "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "num_key_value_heads": 2,
    },
    derived=layer_types,
    fixed={**EVERY_LAYER, "norm_topk_prob": True, "attention_bias": False},
    kinds=LINEAR_KINDS,
    problems=problems,
    restored=restored,
    rename=rename,
    extra_layers=extra_layers,
)  # fmt: skip
