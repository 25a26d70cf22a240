"""The config.json that a GGUF base was made from: the tables of a family, read the other way, and then proven.

Metadata holds less than a configuration, but all that llama.cpp computes with, so what comes back computes the same.
Nothing is believed: `problems_of_stored` lets the family write its metadata again from the configuration, and names
every key, and every computed tensor, that comes out otherwise than it lies in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.architectures import FAMILIES, MODEL_TYPES
from converters.architectures.family import Config, Family
from converters.architectures.settings import complete, flatten, llama3_factors, problems_of
from converters.architectures.stored import Stored, decimal
from converters.errors import UnsupportedError
from converters.tensor_kinds import EMBEDDING, OUTPUT

ROPE_FACTORS = "rope_freqs.weight"
COMPUTED = frozenset((ROPE_FACTORS, "rope_factors_long.weight", "rope_factors_short.weight"))
LLAMA3_BOUNDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
NEARLY = 1e-6  # computed tensors: powers in float32 of two libraries

# Metadata key, and the setting that transformers reads it from; those of one family are in its file (`restored`).
NAMES: tuple[tuple[str, str], ...] = (
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.sliding_window", "sliding_window"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("use_parallel_residual", "use_parallel_residual"),
    ("expert_count", "num_experts"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
)
TOKENS = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")  # names of `attention.layer_norm_epsilon`
YARN = (
    ("extrapolation_factor", "rope.scaling.yarn_ext_factor"),
    ("attention_factor", "rope.scaling.yarn_attn_factor"),
    ("beta_fast", "rope.scaling.yarn_beta_fast"),
    ("beta_slow", "rope.scaling.yarn_beta_slow"),
)
# Where several classes have one architecture: the keys that only files of this one have.
MARKS: Mapping[str, tuple[str, ...]] = {
    "MixtralForCausalLM": ("expert_count",),
    "Olmo3ForCausalLM": ("attention.sliding_window",),
    "Ministral3ForCausalLM": ("attention.temperature_scale",),
}


def class_of(stored: Stored) -> str:
    """The class of transformers that computes what llama.cpp does for this architecture.

    Raises:
        UnsupportedError: it is the text part of a model that sees, which transformers has no class for on its own.
    """
    names = [name for name, family in FAMILIES.items() if family.architecture == stored.architecture]
    alone = [name for name in names if name.endswith(("ForCausalLM", "LMHeadModel"))]
    marked = [name for name in alone if name in MARKS and all(stored[mark] is not None for mark in MARKS[name])]
    usual = [name for name in alone if name not in MARKS]
    if not marked and not usual:
        raise UnsupportedError(
            f"{stored.architecture}: a model with vision, and transformers has no class for its text part alone",
            hint="Train on its Hugging Face folder.",
        )
    return (marked or usual)[0]


def configuration(stored: Stored) -> dict[str, Any]:
    """A config.json for a base, not proven yet.

    Raises:
        UnsupportedError: no class of transformers for its architecture, or a rotary embedding nobody can name.
    """
    name = class_of(stored)
    family = FAMILIES[name]
    found = {setting: stored[key] for key, setting in NAMES if not isinstance(stored[key], (list, type(None)))}
    found |= {"vocab_size": stored.shapes[EMBEDDING][0], "tie_word_embeddings": OUTPUT not in stored.shapes}
    found |= {setting: stored["attention.layer_norm_epsilon"] for setting in EPSILONS if setting in family.defaults}
    found |= {row.bias: stored.has(f"{row.gguf}.bias") for row in family.rows if isinstance(row.bias, str)}
    found |= {f"{name}_token_id": stored.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKENS}
    found["rope_parameters"] = _rope(stored, found, family)
    found |= family.fixed
    found |= family.restored(stored, found)
    aliased = {alias: found[setting] for alias, setting in family.aliases.items() if setting in found}
    return {**found, **aliased, "architectures": [name], "model_type": MODEL_TYPES[name]}


def _rope(stored: Stored, found: Config, family: Family) -> dict[str, Any]:
    head = stored["attention.key_length"] or found["hidden_size"] // found["num_attention_heads"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": stored["rope.freq_base"] or 10000.0}
    if (rotated := stored["rope.dimension_count"]) not in (None, head):
        rope["partial_rotary_factor"] = rotated / head
    kind = stored["rope.scaling.type"]
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": stored["rope.scaling.factor"]}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = stored["rope.scaling.original_context_length"]
        rope |= {name: stored[key] for name, key in YARN if stored[key] is not None}
    if ROPE_FACTORS in stored.shapes and family.computed is llama3_factors:
        rope = _llama3(stored, rope, {**found, "head_dim": head})
    if (local := stored["rope.freq_base_swa"]) is not None:
        return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    return rope


def _llama3(stored: Stored, rope: Config, found: Config) -> dict[str, Any]:
    """The settings whose factors lie in the file: Llama 3's usual bounds, and the context that fits them.

    Raises:
        UnsupportedError: none fits.
    """
    factors = stored.read(ROPE_FACTORS)
    guess = {**rope, "rope_type": "llama3", "factor": decimal(float(factors.max())), **LLAMA3_BOUNDS}
    contexts = (2**power for power in range(1, int(found["max_position_embeddings"]).bit_length()))
    for context in contexts:
        settings = {**guess, "original_max_position_embeddings": context}
        made = llama3_factors({**found, "rope_parameters": settings})[ROPE_FACTORS]
        if made.shape == factors.shape and np.allclose(made, factors, rtol=NEARLY, atol=0):
            return settings
    raise UnsupportedError(
        f"{ROPE_FACTORS}: factors of a rotary embedding that no usual settings of Llama 3 give",
        hint="Give the model's own config.json with --base-config FOLDER.",
    )


def problems_of_stored(config: Config, stored: Stored) -> list[str]:
    """Everything in which a model of this configuration differs from the file; empty where it computes the same.

    Args:
        config: as config.json has it, or `to_dict()` of transformers' object.
    """
    flat = flatten(config)
    names = flat.get("architectures") or [""]
    family = FAMILIES.get(str(names[0]))
    if family is None or family.architecture != stored.architecture:
        return [f"the file is a {stored.architecture} model, the configuration a {names[0] or 'model of no class'}"]
    extra = stored["nextn_predict_layers"] or 0
    full = complete(flat, family, extra)
    if problems := problems_of(full, flat, family):
        return problems
    return [*_other_sizes(full, stored), *_other_keys(family, full, stored), *_other_tensors(family, full, stored)]


def _other_sizes(config: Config, stored: Stored) -> list[str]:
    vocab, tied = stored.shapes[EMBEDDING][0], OUTPUT not in stored.shapes
    found = [] if config["vocab_size"] == vocab else [f"vocab_size is {config['vocab_size']}, the file has {vocab}"]
    if tied and not config.get("tie_word_embeddings"):
        found.append("tie_word_embeddings is false, and the file has no output of its own")
    return found


def _other_keys(family: Family, config: Config, stored: Stored) -> list[str]:
    prefix = f"{family.architecture}."
    names = [key.removeprefix(prefix) for key in stored.metadata if key.startswith(prefix)]
    there = {name: stored[name] for name in names}
    wanted = {key: decimal(value) for key, value in family.hyperparameters(config).items()}
    return [
        f"{prefix}{key} is {there.get(key)!r}, and this configuration gives {wanted.get(key)!r}"
        for key in sorted({*there, *wanted})
        if not _equal(there.get(key), wanted.get(key)) and not (key not in there and wanted[key] == _taken(key, stored))
    ]


def _equal(one: Any, other: Any) -> bool:
    """Of the same value; a list that says the same for all layers is that value."""
    if isinstance(one, list) and not isinstance(other, list) and other is not None:
        return all(item == other for item in one)
    return bool(one == other)


def _taken(key: str, stored: Stored) -> Any:
    """What llama.cpp takes where a file, an older one perhaps, does not have a key (`load_hparams`)."""
    heads = stored["attention.head_count"]
    head = stored["attention.key_length"] or stored["embedding_length"] // heads
    return {
        "attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head,
        "rope.freq_base": 10000.0, "attention.head_count_kv": heads, "vocab_size": stored.shapes[EMBEDDING][0],
    }.get(key)  # fmt: skip


def _other_tensors(family: Family, config: Config, stored: Stored) -> list[str]:
    wanted = family.computed(config)
    return [
        f"{name} of the file is not what this configuration gives"
        for name in {*wanted, *(COMPUTED & set(stored.shapes))}
        if name not in wanted
        or name not in stored.shapes
        or wanted[name].shape != (read := stored.read(name).reshape(-1)).shape
        or not np.allclose(wanted[name], read, rtol=NEARLY, atol=0)
    ]
