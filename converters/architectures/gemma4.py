"""Gemma 4, the text model: dense, with experts, and with an input for each layer (E2B, E4B).

Layers that see the whole context have wider heads than those that see a window; the last ones may share keys and
values with earlier ones, and values may be keys. llama.cpp: src/models/gemma4.cpp; its converter: conversion/gemma.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from converters.architectures import gemma
from converters.architectures.blocks import BLK, LAYER, attention, embeddings, gated_mlp, head_norms, norm, where
from converters.architectures.family import Config, Family, Present, Row
from converters.architectures.settings import common, full_rope, is_number, is_whole, sliding_layers
from converters.architectures.stored import Stored
from converters.tokenizer_rules import GEMMA_4_RULES

UNROTATED = 1e30  # a frequency divided by this does not turn


def has_keys(config: Config, layer: int | None) -> bool:
    """Not one of the last layers, which take the keys and values of an earlier one."""
    return layer is not None and layer < config["num_hidden_layers"] - config["num_kv_shared_layers"]


def has_values(config: Config, layer: int | None) -> bool:
    is_sliding = layer is not None and config["layer_types"][layer] == "sliding_attention"
    return has_keys(config, layer) and (is_sliding or not config.get("attention_k_eq_v"))


_q, _k, _v, _o = attention()
_q_norm, _k_norm = head_norms()


def _own(row: Row, present: Present) -> Row:
    """Keys and values: released checkpoints hold them also for layers that take an earlier layer's."""
    return Row(row.hf, row.gguf, row.shape, when=present, if_stored=True)


per_layer, sparse = where("hidden_size_per_layer_input"), where("enable_moe_block")
EXPERTS = f"{LAYER}.experts"
ROWS = (
    *embeddings(),
    *(norm(hf, gguf) for hf, gguf in (
        ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"), ("post_feedforward_layernorm", "post_ffw_norm"),
    )),
    _q, _own(_k, has_keys), _own(_v, has_values), _o, _q_norm, _own(_k_norm, has_keys),
    *gated_mlp(),
    Row(f"{LAYER}.layer_scalar", f"{BLK}.layer_output_scale", (1,), ends=("", ".weight")),
    # an input for each layer
    Row("model.embed_tokens_per_layer", "per_layer_token_embd", ("vocab", "all_per_layer_inputs"), when=per_layer,
        adaptable=False),
    Row("model.per_layer_model_projection", "per_layer_model_proj", ("all_per_layer_inputs", "embedding"),
        when=per_layer, adaptable=False),
    Row("model.per_layer_projection_norm", "per_layer_proj_norm", ("per_layer_input",), when=per_layer),
    Row(f"{LAYER}.per_layer_input_gate", f"{BLK}.inp_gate", ("per_layer_input", "embedding"), when=per_layer),
    Row(f"{LAYER}.per_layer_projection", f"{BLK}.proj", ("embedding", "per_layer_input"), when=per_layer),
    norm("post_per_layer_input_norm", "post_norm", when=per_layer),
    # experts beside the dense part
    Row(f"{LAYER}.router.proj", f"{BLK}.ffn_gate_inp", ("experts", "embedding"), when=sparse),
    Row(f"{LAYER}.router.scale", f"{BLK}.ffn_gate_inp", ("embedding",), ends=("", ".scale"), when=sparse),
    Row(f"{LAYER}.router.per_expert_scale", f"{BLK}.ffn_down_exps", ("experts",), ends=("", ".scale"), when=sparse),
    Row(f"{EXPERTS}.gate_up_proj", f"{BLK}.ffn_gate_up_exps", ("experts", "two_expert_feed_forward", "embedding"),
        ends=("", ".weight"), when=sparse),
    Row(f"{EXPERTS}.down_proj", f"{BLK}.ffn_down_exps", ("experts", "embedding", "expert_feed_forward"),
        ends=("", ".weight"), scaled_by=".scale", when=sparse),
    *(norm(hf, gguf, when=sparse) for hf, gguf in (
        ("post_feedforward_layernorm_1", "post_ffw_norm_1"), ("post_feedforward_layernorm_2", "post_ffw_norm_2"),
        ("pre_feedforward_layernorm_2", "pre_ffw_norm_2"),
    )),
)  # fmt: skip


FULL_HEAD_DIM = 512  # what transformers takes for layers of full attention
OWN = ("head_dim", "num_key_value_heads")  # settings that a layer may have for itself


def _of_full_layers(config: Config, name: str, older: str) -> Any:
    """A setting that layers of full attention have for themselves: `per_layer_config`, or a key of its own."""
    if config.get(older) is not None or not config.get("per_layer_config"):
        return config.get(older)
    own: Config = config.get("per_layer_config") or {}
    kinds = config["layer_types"]
    full = [
        own[str(n)][name] for n, kind in enumerate(kinds) if kind == "full_attention" and name in own.get(str(n), {})
    ]
    return full[0] if full else None


def _full_head_dim(config: Config) -> int:
    own: int | None = _of_full_layers(config, "head_dim", "global_head_dim")
    return own or (config["head_dim"] if config.get("per_layer_config") else FULL_HEAD_DIM)


def hyperparameters(config: Config) -> dict[str, Any]:
    values, sliding = common(config), sliding_layers(config)
    full_dim = _full_head_dim(config)
    local = config["rope_parameters"]["sliding_attention"]
    values |= {
        "attention.sliding_window": config["sliding_window"],
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "embedding_length_per_layer_input": config.get("hidden_size_per_layer_input") or 0,
        "attention.sliding_window_pattern": sliding,
        "attention.key_length": full_dim,
        "attention.value_length": full_dim,
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "rope.dimension_count": full_dim,
        "rope.dimension_count_swa": int(config["head_dim"] * local.get("partial_rotary_factor", 1.0)),
    }
    values.pop("rope.scaling.type", None)
    # Always: without the key, llama.cpp's gemma4 takes 30 (src/llama-hparams.h).
    values["final_logit_softcapping"] = float(config.get("final_logit_softcapping") or 0.0)
    if config.get("moe_intermediate_size"):
        values["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if full_heads := _of_full_layers(config, "num_key_value_heads", "num_global_key_value_heads"):
        values["attention.head_count_kv"] = [config["num_key_value_heads"] if is_local else full_heads
                                             for is_local in sliding]  # fmt: skip
    if config.get("use_double_wide_mlp"):
        size, layers = config["intermediate_size"], range(config["num_hidden_layers"])
        values["feed_forward_length"] = [size if has_keys(config, layer) else 2 * size for layer in layers]
    return values


def computed(config: Config) -> dict[str, npt.NDArray[np.float32]]:
    """Which part of a head is rotated in layers that see the whole context: the first values of each half."""
    rope = full_rope(config)
    dim = _full_head_dim(config)
    rotated = int(dim * rope.get("partial_rotary_factor", 1.0) / 2)
    return {"rope_freqs.weight": np.array([1.0] * rotated + [UNROTATED] * (dim // 2 - rotated), np.float32)}


def derived(config: Config) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    kinds = ["full_attention" if (n + 1) % 6 == 0 or n == layers - 1 else "sliding_attention" for n in range(layers)]
    return {"layer_types": kinds}


def _is_size(value: Any) -> bool:
    return value is None or is_whole(value)


def problems(config: Config) -> list[str]:
    ropes = config["rope_parameters"]
    kinds = {name: ropes[name].get("rope_type") for name in ropes if isinstance(ropes[name], dict)}
    own = config.get("per_layer_config") or {}
    types, first_shared = config["layer_types"], config["num_hidden_layers"] - config["num_kv_shared_layers"]
    odd = [n for n, layer in own.items() if not isinstance(layer, dict) or not all(map(_is_size, map(layer.get, OWN)))]
    checks = (
        (
            not odd,
            f"per_layer_config has layers ({', '.join(odd)}) whose {' or '.join(OWN)} is no positive whole number",
        ),
        (
            kinds == {"full_attention": "proportional", "sliding_attention": "default"},
            f"rope_parameters are {kinds}, expected proportional for full and default for sliding attention",
        ),
        (is_number(config.get("sliding_window")), f"sliding_window is {config.get('sliding_window')!r}"),
        (types[-1:] == ["full_attention"], "the last layer has no full attention, which transformers gives it"),
        # Which layer's they are: `reuse` of the KV cache, src/llama-model.cpp; `kv_sharing_modes` of transformers.
        (
            first_shared == config["num_hidden_layers"]
            or types[first_shared - 2 : first_shared] == ["sliding_attention", "full_attention"],
            f"num_kv_shared_layers is {config['num_kv_shared_layers']}, and llama.cpp takes the keys of the two layers "
            "before the shared ones for those of a layer with a window and of one that sees all",
        ),
        (
            not config.get("num_global_key_value_heads") or bool(config.get("attention_k_eq_v")),
            "num_global_key_value_heads without attention_k_eq_v, which transformers does not read and llama.cpp does",
        ),
    )
    return [problem for ok, problem in checks if not ok]


def restored(stored: Stored, found: Config) -> dict[str, Any]:
    sliding = stored["attention.sliding_window_pattern"]
    kinds = ["sliding_attention" if is_local else "full_attention" for is_local in sliding]
    first_full = kinds.index("full_attention") if "full_attention" in kinds else 0
    heads_kv, sizes = stored["attention.head_count_kv"], stored["feed_forward_length"]
    settings = {
        "layer_types": kinds,
        "head_dim": stored["attention.key_length_swa"],
        "global_head_dim": stored["attention.key_length"],
        "num_kv_shared_layers": stored["attention.shared_kv_layers"],
        "hidden_size_per_layer_input": stored["embedding_length_per_layer_input"],
        "vocab_size_per_layer_input": found["vocab_size"],
        "final_logit_softcapping": stored["final_logit_softcapping"] or None,
        "enable_moe_block": stored["expert_count"] is not None,
        "attention_k_eq_v": not stored.has(f"blk.{first_full}.attn_v.weight"),
        "rope_parameters": _restored_ropes(stored),
    }
    if isinstance(heads_kv, list):
        settings["num_global_key_value_heads"] = heads_kv[first_full]
        settings["num_key_value_heads"] = next(
            (heads for heads, is_local in zip(heads_kv, sliding, strict=True) if is_local), heads_kv[0]
        )
    if isinstance(sizes, list):
        settings |= {"intermediate_size": sizes[0], "use_double_wide_mlp": min(sizes) < max(sizes)}
    return settings


def _restored_ropes(stored: Stored) -> dict[str, Any]:
    rotated = int((stored.read("rope_freqs.weight") == 1).sum())
    full = {"rope_type": "proportional", "rope_theta": stored["rope.freq_base"]}
    local: dict[str, Any] = {"rope_type": "default", "rope_theta": stored["rope.freq_base_swa"]}
    if (turning := stored["rope.dimension_count_swa"]) != stored["attention.key_length_swa"]:
        local["partial_rotary_factor"] = turning / stored["attention.key_length_swa"]
    return {
        "full_attention": {**full, "partial_rotary_factor": 2 * rotated / stored["attention.key_length"]},
        "sliding_attention": local,
    }


FAMILY = Family(
    "gemma4",
    ROWS,
    hyperparameters,
    defaults={
        **gemma.DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 4, "sliding_window": 512,
        "vocab_size": 262144, "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        },
    },
    aliases={"top_k_experts": "num_experts_per_tok", "expert_intermediate_size": "moe_intermediate_size"},
    derived=derived,
    activations=gemma.GELU,
    # "vision": tokens of an image see one another, those of a text do not
    fixed={"attention_bias": False, "use_bidirectional_attention": "vision"},
    kinds={
        "head_dim": "whole",
        "sliding_window": "whole", "num_kv_shared_layers": "count", "hidden_size_per_layer_input": "count?",
        "final_logit_softcapping": "number?", "global_head_dim": "whole?", "num_global_key_value_heads": "whole?",
        "per_layer_config": "object?",
    },
    problems=problems,
    restored=restored,
    computed=computed,
    ignored=gemma.FAMILY.ignored,
    tokenizer=GEMMA_4_RULES,
)  # fmt: skip
