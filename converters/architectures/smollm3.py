"""SmolLM3: Llama whose every fourth layer has no rotary embedding. llama.cpp: src/models/smollm3.cpp."""

from __future__ import annotations

from converters.architectures import llama
from converters.architectures.family import Config, Family
from converters.architectures.settings import llama3_factors
from converters.tokenizer_rules import LLAMA_RULES

INTERVAL = 4  # n_no_rope_layer_step, src/models/smollm3.cpp


def problems(config: Config) -> list[str]:
    layers = range(config["num_hidden_layers"])
    usual = [int((layer + 1) % INTERVAL != 0) for layer in layers]
    given = config.get("no_rope_layers") or usual
    own = [] if list(given) == usual else [f"no_rope_layers is {given}, and llama.cpp skips every {INTERVAL}th layer"]
    return [*own, *llama.problems(config)]


FAMILY = Family(
    "smollm3",
    llama.DENSE,
    llama.hyperparameters,
    defaults={
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 2e6, "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    fixed={"use_sliding_window": False},
    kinds={"no_rope_layers": "list?", "no_rope_layer_interval": "whole?"},
    problems=problems,
    computed=llama3_factors,
    tokenizer=LLAMA_RULES,
)  # fmt: skip
