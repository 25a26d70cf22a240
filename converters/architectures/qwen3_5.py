"""Qwen3.5, dense and with experts: Qwen3-Next with its input projections apart.

Where there are more value heads than key heads, llama.cpp keeps them in the order in which it repeats the keys: the
first value head of every key head, then the second of each (`_reorder_v_heads`, conversion/qwen.py). llama.cpp:
src/models/qwen35.cpp, src/models/qwen35moe.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from converters.architectures.blocks import BLK, embeddings, experts, gated_mlp, shared_expert
from converters.architectures.family import PLUS_ONE, Config, Family, Indices, Row
from converters.architectures.qwen2_moe import hyperparameters as mixture
from converters.architectures.qwen3_next import (
    LINEAR,
    LINEAR_DEFAULTS,
    LINEAR_KINDS,
    NORMS,
    PREDICTING,
    extra_layers,
    full_attention,
    is_linear,
    layer_types,
    linear_attention,
    problems,
    rename,
    restored,
    with_linear,
)
from converters.architectures.settings import common, full_rope
from converters.architectures.sizes import Sizes
from converters.architectures.stored import Stored

SECTIONS = [11, 11, 10, 0]  # of the rotary embedding, for time, height, width: what transformers takes by default


def _values(sizes: Sizes, dim: int) -> Indices:
    order = np.arange(sizes["value_heads"] * dim, dtype=np.int64)
    return order.reshape(sizes["key_heads"], -1, dim).swapaxes(0, 1).reshape(-1)


def _heads(sizes: Sizes) -> Indices:
    return _values(sizes, 1)


def _rows(sizes: Sizes) -> Indices:
    return _values(sizes, sizes["value_head_dim"])


def _qkv(sizes: Sizes) -> Indices:
    keys = 2 * sizes["key_rows"]
    return np.concatenate([np.arange(keys, dtype=np.int64), keys + _rows(sizes)])


PROJECTIONS = (
    Row(f"{LINEAR}.in_proj_qkv", f"{BLK}.attn_qkv", ("conv_rows", "embedding"), rows=_qkv, when=is_linear),
    Row(f"{LINEAR}.in_proj_z", f"{BLK}.attn_gate", ("value_rows", "embedding"), rows=_rows, when=is_linear),
    Row(f"{LINEAR}.in_proj_a", f"{BLK}.ssm_alpha", ("value_heads", "embedding"), rows=_heads, when=is_linear),
    Row(f"{LINEAR}.in_proj_b", f"{BLK}.ssm_beta", ("value_heads", "embedding"), rows=_heads, when=is_linear),
)
SHARED_ROWS = (
    *embeddings(norm_value=PLUS_ONE),
    *NORMS,
    *linear_attention(projections=PROJECTIONS, heads=_heads, rows=_qkv, columns=_rows),
    *full_attention(),
    *PREDICTING,
)


def _with_sections(values: dict[str, Any], config: Config) -> dict[str, Any]:
    sections = [*full_rope(config).get("mrope_section", SECTIONS), 0, 0, 0, 0][:4]
    return with_linear(values, config) | {"rope.dimension_sections": sections}


def dense_hyperparameters(config: Config) -> dict[str, Any]:
    return _with_sections(common(config), config)


def mixture_hyperparameters(config: Config) -> dict[str, Any]:
    values = _with_sections(mixture(config), config)
    return values if config["has_intermediate_size"] else {
        key: value for key, value in values.items() if key != "feed_forward_length"
    }  # fmt: skip


def _mixture_derived(config: Config) -> dict[str, Any]:
    """No layer is dense, so `intermediate_size` says nothing; where the file has it, the converter writes it."""
    has = "intermediate_size" in config
    return {**layer_types(config), "intermediate_size": config["moe_intermediate_size"], "has_intermediate_size": has}


def with_sections(stored: Stored, found: Config) -> dict[str, Any]:
    rope = {**found["rope_parameters"], "mrope_section": stored["rope.dimension_sections"][:3]}
    return {**restored(stored, found), "rope_parameters": rope}


DENSE = Family(
    "qwen35",
    (*SHARED_ROWS, *gated_mlp()),
    dense_hyperparameters,
    defaults={**LINEAR_DEFAULTS, "num_key_value_heads": 4},
    derived=layer_types,
    fixed={"attention_bias": False},
    kinds=LINEAR_KINDS,
    problems=problems,
    restored=with_sections,
    rename=rename,
    extra_layers=extra_layers,
)
MIXTURE = Family(
    "qwen35moe",
    (*SHARED_ROWS, *experts(), *shared_expert()),
    mixture_hyperparameters,
    defaults={
        **LINEAR_DEFAULTS, "num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    },
    derived=_mixture_derived,
    fixed={"attention_bias": False},
    kinds=LINEAR_KINDS,
    problems=problems,
    restored=with_sections,
    rename=rename,
    extra_layers=extra_layers,
)  # fmt: skip
