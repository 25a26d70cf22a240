"""Qwen1.5-MoE and Qwen2-MoE: experts, and one that every token passes. llama.cpp: src/models/qwen2moe.cpp."""

from __future__ import annotations

from typing import Any

from converters.architectures.blocks import attention, embeddings, experts, norm, shared_expert
from converters.architectures.family import Config, Family
from converters.architectures.qwen2 import DEFAULTS, notices, problems_of_plain_heads
from converters.architectures.settings import common

ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *attention(bias="qkv_bias"),
    norm("post_attention_layernorm", "ffn_norm"),
    *experts(),
    *shared_expert(),
)
# What llama.cpp's graphs of mixtures compute: experts in every layer.
EVERY_LAYER: dict[str, Any] = {"mlp_only_layers": [], "decoder_sparse_step": 1}


def hyperparameters(config: Config) -> dict[str, Any]:
    values = {**common(config), "expert_feed_forward_length": config["moe_intermediate_size"]}
    if config.get("shared_expert_intermediate_size"):
        values["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return values


FAMILY = Family(
    "qwen2moe",
    ROWS,
    hyperparameters,
    defaults={
        **DEFAULTS, "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_key_value_heads": 16,
    },
    fixed={**EVERY_LAYER, "norm_topk_prob": False, "tie_word_embeddings": False},
    problems=problems_of_plain_heads,
    notices=notices,
)  # fmt: skip
