"""SmolLM3: Llama whose every fourth layer has no rotary embedding. llama.cpp: src/models/smollm3.cpp."""

from __future__ import annotations

from converters.architectures import llama
from converters.architectures.blocks import attention, embeddings, gated_mlp, norm
from converters.architectures.family import Config, Family
from converters.architectures.settings import rope_type_problems, whole_rope
from converters.tokenizer_rules import LLAMA_RULES

ROWS = (
    *embeddings(),
    norm("input_layernorm", "attn_norm"),
    *attention(bias="attention_bias", q_order=llama.q_order, k_order=llama.k_order),
    norm("post_attention_layernorm", "ffn_norm"),
    *gated_mlp(),
)
INTERVAL = 4  # n_no_rope_layer_step, src/models/smollm3.cpp


def problems(config: Config) -> list[str]:
    usual, given = _rotated(config, INTERVAL), config.get("no_rope_layers")
    if given is None:
        given = _rotated(config, config.get("no_rope_layer_interval", INTERVAL))
    own = [] if given == usual else [f"no_rope_layers is {given}, and llama.cpp skips every {INTERVAL}th layer"]
    return [*own, *rope_type_problems("default", "linear", "yarn")(config), *whole_rope(config)]


def _rotated(config: Config, interval: int) -> list[int]:
    return [int((layer + 1) % interval != 0) for layer in range(config["num_hidden_layers"])]


FAMILY = Family(
    "smollm3",
    ROWS,
    llama.hyperparameters,
    defaults={
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 2e6, "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    # biases, and factors of the rotary embedding, that its graph does not load
    fixed={"use_sliding_window": False, "attention_bias": False, "mlp_bias": False},
    kinds={"no_rope_layers": "list?", "no_rope_layer_interval": "whole?"},
    problems=problems,
    tokenizer=LLAMA_RULES,
)  # fmt: skip
