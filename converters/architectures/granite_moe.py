"""Granite 3 with experts (1B-A400M, 3B-A800M).

llama.cpp: src/models/granite-moe.cpp; its converter: conversion/granite.py.
"""

from __future__ import annotations

from converters.architectures import granite, llama
from converters.architectures.blocks import BLK, LAYER, embeddings, first_halves, norm, second_halves
from converters.architectures.family import Family, Row
from converters.architectures.settings import llama3_factors
from converters.tokenizer_rules import LLAMA_RULES

MOE = f"{LAYER}.block_sparse_moe"
WIDE = ("experts", "expert_feed_forward", "embedding")
FUSED = ("experts", "two_expert_feed_forward", "embedding")
ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *llama.ATTENTION,
    norm("post_attention_layernorm", "ffn_norm"),
    Row(f"{MOE}.router.layer", f"{BLK}.ffn_gate_inp", ("experts", "embedding")),
    Row(f"{MOE}.input_linear", f"{BLK}.ffn_gate_exps", WIDE, rows=first_halves, hf_shape=FUSED),
    Row(f"{MOE}.input_linear", f"{BLK}.ffn_up_exps", WIDE, rows=second_halves, hf_shape=FUSED),
    Row(f"{MOE}.output_linear", f"{BLK}.ffn_down_exps", ("experts", "embedding", "expert_feed_forward")),
)


FAMILY = Family(
    "granitemoe",
    ROWS,
    granite.hyperparameters,
    defaults={**granite.FAMILY.defaults, "num_experts": 8, "num_experts_per_tok": 2},
    aliases={"num_local_experts": "num_experts"},
    modules={".router.weight": ".router.layer.weight", ".experts.gate_up_proj": ".input_linear.weight",
             ".experts.down_proj": ".output_linear.weight"},
    problems=granite.problems,
    restored=granite.restored,
    kinds=granite.FAMILY.kinds,
    computed=llama3_factors,
    tokenizer=LLAMA_RULES,
)  # fmt: skip
