"""ERNIE 4.5 with experts (21B-A3B): dense layers first. llama.cpp: src/models/ernie4-5-moe.cpp; conversion/ernie.py."""

from __future__ import annotations

from typing import Any

from converters.architectures import ernie4_5
from converters.architectures.blocks import BLK, LAYER, attention, embeddings, experts, gated_mlp, norm
from converters.architectures.family import IGNORED, Config, Family, Row
from converters.architectures.settings import common
from converters.architectures.stored import Stored
from converters.tokenizer_rules import ERNIE_RULES


def is_sparse(config: Config, layer: int | None) -> bool:
    start, interval = config["moe_layer_start_index"], config["moe_layer_interval"]
    return layer is not None and layer >= start and (layer + 1) % interval == 0


def is_dense(config: Config, layer: int | None) -> bool:
    return not is_sparse(config, layer)


def has_shared(config: Config, layer: int | None) -> bool:
    return is_sparse(config, layer) and bool(config["moe_num_shared_experts"])


SHARED = f"{LAYER}.mlp.shared_experts"
ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *attention(bias="use_bias"),
    norm("post_attention_layernorm", "ffn_norm"),
    *gated_mlp(when=is_dense),
    *experts(when=is_sparse),
    Row(f"{LAYER}.mlp.moe_statics.e_score_correction_bias", f"{BLK}.exp_probs_b", (1, "experts"), ends=("", ".bias"),
        when=is_sparse),
    Row(f"{SHARED}.gate_proj", f"{BLK}.ffn_gate_shexp", ("shared_feed_forward", "embedding"), when=has_shared),
    Row(f"{SHARED}.up_proj", f"{BLK}.ffn_up_shexp", ("shared_feed_forward", "embedding"), when=has_shared),
    Row(f"{SHARED}.down_proj", f"{BLK}.ffn_down_shexp", ("embedding", "shared_feed_forward"), when=has_shared),
)  # fmt: skip


def hyperparameters(config: Config) -> dict[str, Any]:
    values = common(config) | {
        "interleave_moe_layer_step": config["moe_layer_interval"],
        "leading_dense_block_count": config["moe_layer_start_index"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["moe_num_shared_experts"],
    }
    if config["moe_num_shared_experts"]:
        # The size of the tensors. Its converter divides two settings, which is the same in the released models.
        shared = config["moe_intermediate_size"] * config["moe_num_shared_experts"]
        values["expert_shared_feed_forward_length"] = shared
    return values


def problems(config: Config) -> list[str]:
    last, end = config["num_hidden_layers"] - 1, config.get("moe_layer_end_index", -1)
    own = [] if end in (-1, last) else [f"moe_layer_end_index is {end}, and llama.cpp has experts up to layer {last}"]
    return [*own, *ernie4_5.problems(config)]


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    return {
        "moe_num_shared_experts": stored["expert_shared_count"],
        "moe_layer_interval": stored["interleave_moe_layer_step"],
        "moe_layer_start_index": stored["leading_dense_block_count"],
    }


FAMILY = Family(
    "ernie4_5-moe",
    ROWS,
    hyperparameters,
    defaults={
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "num_key_value_heads": 4,
        "tie_word_embeddings": True, "num_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_interval": 1,
    },
    aliases={"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"},
    kinds={
        "moe_num_shared_experts": "count", "moe_layer_start_index": "count", "moe_layer_interval": "whole",
        "moe_intermediate_size": "whole",
    },
    fixed={"use_bias": False},
    problems=problems,
    restored=restored,
    ignored=(*IGNORED, r"model\.mtp_\w+\..*"),
    rename=ernie4_5.FAMILY.rename,
    tokenizer=ERNIE_RULES,
)  # fmt: skip
