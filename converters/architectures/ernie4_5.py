"""ERNIE 4.5, dense. llama.cpp: src/models/ernie4-5.cpp; its converter: conversion/ernie.py."""

from __future__ import annotations

from converters.architectures.blocks import BLK, LAYER, attention, embeddings, gated_mlp, norm
from converters.architectures.family import Config, Family, Indices, Order, Row, grouped_rows
from converters.architectures.settings import common, rope_type_problems, whole_rope
from converters.architectures.sizes import Sizes
from converters.tokenizer_rules import ERNIE_RULES


def _qkv(part: int) -> Order:
    def rows(sizes: Sizes) -> Indices:
        return grouped_rows(1, (sizes["q_rows"], sizes["kv_rows"], sizes["v_rows"]), (part,))

    return rows


def _gate_up(part: int) -> Order:
    def rows(sizes: Sizes) -> Indices:
        return grouped_rows(1, (sizes["feed_forward"], sizes["feed_forward"]), (part,))

    return rows


QKV, UP_GATE = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.up_gate_proj"
ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *attention(bias="use_bias"),
    *(
        Row(QKV, f"{BLK}.attn_{name}", (size, "embedding"), rows=_qkv(part), hf_shape=("qkv_rows", "embedding"))
        for part, (name, size) in enumerate((("q", "q_rows"), ("k", "kv_rows"), ("v", "v_rows")))
    ),
    norm("post_attention_layernorm", "ffn_norm"),
    *gated_mlp(),
    *(
        Row(UP_GATE, f"{BLK}.ffn_{name}", ("feed_forward", "embedding"), rows=_gate_up(part),
            hf_shape=("two_feed_forward", "embedding"))
        for part, name in enumerate(("gate", "up"))
    ),
)  # fmt: skip


def problems(config: Config) -> list[str]:
    return [*rope_type_problems("default", "linear", "yarn")(config), *whole_rope(config)]


FAMILY = Family(
    "ernie4_5",
    ROWS,
    common,
    defaults={
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "head_dim": 128,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    fixed={"use_bias": False},
    problems=problems,
    rename=lambda name, config: name.replace("ernie.", "model.", 1) if name.startswith("ernie.") else name,
    tokenizer=ERNIE_RULES,
)  # fmt: skip
