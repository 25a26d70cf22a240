"""Llama 1, 2 and 3, and the models that are Llama under another name (Mistral, SmolLM2, Yi, TinyLlama).

llama.cpp: src/models/llama.cpp; its converter: conversion/llama.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.architectures.family import Config, Family, Row, interleaved_rows

LAYER = "model.layers.{layer}"
ROWS = (
    Row("model.embed_tokens", "token_embd", ("vocab", "embedding")),
    Row("model.norm", "output_norm", ("embedding",)),
    Row("lm_head", "output", ("vocab", "embedding"), absent_if_tied=True),
    Row(f"{LAYER}.input_layernorm", "blk.{layer}.attn_norm", ("embedding",)),
    Row(
        f"{LAYER}.self_attn.q_proj",
        "blk.{layer}.attn_q",
        ("q_rows", "embedding"),
        order=lambda sizes: interleaved_rows(sizes.heads, sizes.head_dim),
        bias="attention_bias",
    ),
    Row(
        f"{LAYER}.self_attn.k_proj",
        "blk.{layer}.attn_k",
        ("kv_rows", "embedding"),
        order=lambda sizes: interleaved_rows(sizes.heads_kv, sizes.head_dim),
        bias="attention_bias",
    ),
    Row(f"{LAYER}.self_attn.v_proj", "blk.{layer}.attn_v", ("kv_rows", "embedding"), bias="attention_bias"),
    Row(f"{LAYER}.self_attn.o_proj", "blk.{layer}.attn_output", ("embedding", "q_rows"), bias="attention_bias"),
    Row(f"{LAYER}.post_attention_layernorm", "blk.{layer}.ffn_norm", ("embedding",)),
    Row(f"{LAYER}.mlp.gate_proj", "blk.{layer}.ffn_gate", ("feed_forward", "embedding"), bias="mlp_bias"),
    Row(f"{LAYER}.mlp.up_proj", "blk.{layer}.ffn_up", ("feed_forward", "embedding"), bias="mlp_bias"),
    Row(f"{LAYER}.mlp.down_proj", "blk.{layer}.ffn_down", ("embedding", "feed_forward"), bias="mlp_bias"),
)

# Configuration key to what it must be; "?" where it may be absent or null.
KINDS = {
    "hidden_size": "whole",
    "intermediate_size": "whole",
    "num_hidden_layers": "whole",
    "num_attention_heads": "whole",
    "vocab_size": "whole",
    "num_key_value_heads": "whole?",
    "head_dim": "whole?",
    "max_position_embeddings": "whole?",
    "rms_norm_eps": "number?",
    "rope_theta": "number?",
    "rope_parameters": "object?",
    "rope_scaling": "object?",
    "quantization_config": "object?",
    "auto_map": "object?",
    "tie_word_embeddings": "true or false?",
    "attention_bias": "true or false?",
    "mlp_bias": "true or false?",
}
F32_MAX = 3.4e38  # numbers are float32 in a GGUF file
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS, src/llama-hparams.h
ROPE_TYPES = ("default", "linear", "llama3")


def hyperparameters(config: Config) -> dict[str, Any]:
    rope = rope_parameters(config)
    values: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config.get("max_position_embeddings") or 2048,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads") or config["num_attention_heads"],
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps") or 1e-6),
    }
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    values |= {"attention.key_length": head_dim(config), "attention.value_length": head_dim(config)}
    values |= {"vocab_size": config["vocab_size"], "rope.dimension_count": head_dim(config)}
    return {f"llama.{key}": value for key, value in values.items()}


def head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_parameters(config: Config) -> dict[str, Any]:
    """One form for the two that transformers has written: `rope_parameters` (5.x), `rope_theta` and `rope_scaling`."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}  # in transformers' order
    rope_type = given.get("rope_type", given.get("type")) or "default"
    theta = given.get("rope_theta", config.get("rope_theta")) or 10000.0
    return {**given, "rope_type": rope_type, "rope_theta": theta}


def problems(config: Config) -> list[str]:
    """Everything about this configuration that llama.cpp's llama graph would compute otherwise."""
    wrong = [
        f"{key} is {config.get(key)!r}, expected {_WANTED[kind.rstrip('?')]}"
        for key, kind in KINDS.items()
        if not (kind.endswith("?") and config.get(key) is None) and not _IS[kind.rstrip("?")](config.get(key))
    ]
    return wrong or [*_sizes(config), *_features(config), *_rope(config)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= F32_MAX


_IS: Mapping[str, Callable[[Any], bool]] = {
    "whole": lambda value: type(value) is int and 1 <= value < 2**31,
    "number": _is_number,
    "object": lambda value: isinstance(value, dict),
    "true or false": lambda value: isinstance(value, bool),
}
_WANTED = {
    "whole": "a positive whole number",
    "number": "a positive number",
    "object": "an object",
    "true or false": "true or false",
}


def _sizes(config: Config) -> list[str]:
    heads, heads_kv = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    checks = (
        (
            config["num_hidden_layers"] <= MAX_LAYERS,
            f"num_hidden_layers is {config['num_hidden_layers']}, llama.cpp holds at most {MAX_LAYERS}",
        ),
        (head_dim(config) % 2 == 0, f"head_dim is {head_dim(config)}, expected an even number"),
        (
            config.get("head_dim") is not None or config["hidden_size"] % heads == 0,
            f"hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads}",
        ),
        (
            heads % heads_kv == 0,
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {heads_kv}",
        ),
    )
    return [problem for ok, problem in checks if not ok]


def _features(config: Config) -> list[str]:
    quantization = config.get("quantization_config") or {}
    remote = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    checks = (
        (config.get("hidden_act", "silu") == "silu", f"hidden_act is {config.get('hidden_act')!r}, expected 'silu'"),
        (
            not quantization,
            f"the weights are quantized ({quantization.get('quant_method', 'quantization_config')}): "
            "download the model in BF16, F16 or F32 instead",
        ),
        (not remote, f"the model is code of its own ({remote}), which is not run"),
    )
    return [problem for ok, problem in checks if not ok]


def _rope(config: Config) -> list[str]:
    rope = rope_parameters(config)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    missing = [key for key in needed.get(str(rope["rope_type"]), ()) if not _is_number(rope.get(key))]
    checks = (
        (rope["rope_type"] in ROPE_TYPES, f"rope_type is {rope['rope_type']!r}, known are {', '.join(ROPE_TYPES)}"),
        (_is_number(rope["rope_theta"]), f"rope_theta is {rope['rope_theta']!r}, expected a positive number"),
        (not missing, f"rope_type {rope['rope_type']!r} lacks {', '.join(missing)}"),
        (
            missing or rope["rope_type"] != "llama3" or rope["low_freq_factor"] < rope["high_freq_factor"],
            f"low_freq_factor {rope.get('low_freq_factor')} is not below "
            f"high_freq_factor {rope.get('high_freq_factor')}",
        ),
        (
            not old or not new or _rope_form(old) == _rope_form(new),
            f"rope_scaling {old} and rope_parameters {new} differ; delete the one the model was not trained with",
        ),
        (partial == 1.0, f"partial_rotary_factor is {partial}, expected 1"),
    )
    return [problem for ok, problem in checks if not ok]


def _rope_form(given: Config) -> dict[str, Any]:
    """What two ways to write the same rotary settings have in common."""
    form = {key: value for key, value in given.items() if key not in ("type", "rope_type", "rope_theta")}
    return {**form, "rope_type": given.get("rope_type", given.get("type")) or "default"}


def notices(config: Config) -> list[str]:
    window = config.get("sliding_window")
    if isinstance(window, int) and window < (config.get("max_position_embeddings") or 0):
        return [f"sliding_window {window} is not applied by llama.cpp: equal up to {window} tokens of context"]
    return []


def computed(config: Config) -> dict[str, npt.NDArray[np.float32]]:
    """`rope_freqs`: what Llama 3 divides its rotary frequencies by (transformers: `_compute_llama3_parameters`)."""
    rope = rope_parameters(config)
    if rope["rope_type"] != "llama3":
        return {}
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    old_context = float(rope["original_max_position_embeddings"])
    steps = np.arange(0, head_dim(config), 2, dtype=np.float32) / np.float32(head_dim(config))
    frequencies = np.float32(1.0) / np.power(np.float32(rope["rope_theta"]), steps)
    factors = []
    for wavelength in (2 * math.pi / float(frequency) for frequency in frequencies):
        smooth = (old_context / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1.0 if smooth > 1 else factor if smooth < 0 else between)  # short, long, and the waves between
    return {"rope_freqs.weight": np.array(factors, np.float32)}


FAMILY = Family("llama", ROWS, hyperparameters, problems, notices, computed)
