"""A `config.json` made complete, checked, and turned into the metadata that families have in common.

transformers fills what a file leaves out, and has written rotary settings in three ways (`rope_theta` and
`rope_scaling`; `rope_parameters`; one of these for each kind of layer). Families see one way only. The keys written,
and from which settings, are those of llama.cpp's converter (`TextModel.set_gguf_parameters`, conversion/base.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.architectures.family import Config, Family
from converters.architectures.sizes import MAX_LAYERS
from converters.architectures.stored import Stored

WRONG = "settings that are not of their kind"
LAYER_KINDS = ("full_attention", "sliding_attention")
F32_MAX = 3.4e38  # numbers are float32 in a GGUF file
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS, src/llama-hparams.h

# What a key must be; "?" where it may be absent or null.
KINDS: Mapping[str, str] = {
    "hidden_size": "whole",
    "intermediate_size": "whole",
    "num_hidden_layers": "layers",
    "num_attention_heads": "whole",
    "vocab_size": "whole",
    "num_key_value_heads": "whole?",
    "head_dim": "whole?",
    "max_position_embeddings": "whole?",
    "original_max_position_embeddings": "whole?",
    "num_experts": "experts?",
    "num_local_experts": "experts?",
    "n_routed_experts": "experts?",
    "num_experts_per_tok": "whole?",
    "moe_intermediate_size": "whole?",
    "shared_expert_intermediate_size": "whole?",
    "top_k_experts": "whole?",
    "n_group": "whole?",
    "topk_group": "whole?",
    "n_positions": "whole?",
    "rms_norm_eps": "number?",
    "norm_eps": "number?",
    "layer_norm_eps": "number?",
    "layer_norm_epsilon": "number?",
    "norm_epsilon": "number?",
    "partial_rotary_factor": "number?",
    "rope_local_base_freq": "number?",
    "rope_theta": "number?",
    "rope_parameters": "object?",
    "rope_scaling": "object?",
    "quantization_config": "object?",
    "auto_map": "object?",
    "layer_types": "list?",
    "tie_word_embeddings": "true or false?",
    "attention_bias": "true or false?",
    "mlp_bias": "true or false?",
    "use_bias": "true or false?",
}
_WANTED = {
    "whole": "a positive whole number",
    "count": "a whole number",
    "layers": f"1 to {MAX_LAYERS}, which llama.cpp holds",
    "experts": f"1 to {MAX_EXPERTS}, which llama.cpp holds",
    "number": "a positive number",
    "object": "an object",
    "list": "a list",
    "true or false": "true or false",
}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= F32_MAX


def is_whole(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


_IS: Mapping[str, Callable[[Any], bool]] = {
    "whole": is_whole,
    "count": lambda value: type(value) is int and 0 <= value < 2**31,
    "layers": lambda value: is_whole(value) and value <= MAX_LAYERS,
    "experts": lambda value: is_whole(value) and value <= MAX_EXPERTS,
    "number": is_number,
    "object": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
    "true or false": lambda value: isinstance(value, bool),
}

# Needed by each way to stretch the rotary embedding, beside `rope_theta`.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def flatten(config: Config) -> dict[str, Any]:
    """A configuration with the text model's part on top of that of a multimodal one."""
    nested = config.get("text_config")
    whole = {key: config.get(key) for key in ("architectures", "model_type")}
    if config.get("tie_word_embeddings") is True:
        whole["tie_word_embeddings"] = True  # the text model's own setting is not looked at then
    return {**config, **nested, **whole} if isinstance(nested, dict) else {**config}


# Where null is no key left out, but says that there is none, or that it follows from others.
NULL_IS_NONE = (
    "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "hidden_size_per_layer_input", "head_dim",
    "num_key_value_heads",
)  # fmt: skip


def complete(flat: Config, family: Family, extra_layers: int = 0) -> dict[str, Any]:
    """A flat configuration with one name for each key, and nothing left out.

    It may still be wrong: see `problems_of`.
    """
    given = {key: value for key, value in flat.items() if value is not None}
    aliased = {name: given[other] for other, name in family.aliases.items() if other in given}
    defaults = {key: value for key, value in family.defaults.items() if key not in flat or key not in NULL_IS_NONE}
    full = {**defaults, **given, **aliased, "extra_layers": extra_layers}
    if wrong := [*_wrong(full, family, needed=("num_hidden_layers", "num_attention_heads", "hidden_size"))]:
        return {**full, WRONG: wrong}
    if family.fills_head_dim and "head_dim" not in full:
        full["head_dim"] = full["hidden_size"] // full["num_attention_heads"]
    full["rope_parameters"] = _rope({**full, "rope_parameters": given.get("rope_parameters")}, family)
    derived = family.derived(full)
    full |= derived if family.derived_wins else {key: value for key, value in derived.items() if key not in full}
    if "num_key_value_heads" not in given:
        full.setdefault("num_key_value_heads", full["num_attention_heads"])
    return full


def _wrong(config: Config, family: Family, needed: Iterable[str]) -> Iterator[str]:
    """Settings that are not of their kind; only those of `needed` have to be there."""
    for key, kind in {**KINDS, **family.kinds}.items():
        value, name = config.get(key), kind.rstrip("?")
        if (value is not None or key in needed) and not _IS[name](value):
            yield f"{key} is {value!r}, expected {_WANTED[name]}"


def _rope(config: Config, family: Family) -> dict[str, Any]:
    given = config.get("rope_scaling") or config.get("rope_parameters") or family.defaults.get("rope_parameters") or {}
    layered = [kind for kind in LAYER_KINDS if isinstance(given.get(kind), dict)]
    if "full_attention" in layered:
        return {kind: _one_rope(given[kind], config, local=kind == "sliding_attention") for kind in layered}
    one = _one_rope(given, config)
    if "rope_local_base_freq" not in config:
        return one
    # Two thetas (Gemma 3, OLMo 3): a stretched rotary embedding is that of the full layers.
    local = {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
    return {"full_attention": one, "sliding_attention": local}


def _one_rope(given: Config, config: Config, *, local: bool = False) -> dict[str, Any]:
    rope = {key: value for key, value in given.items() if value is not None}
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", None)) or "default"
    rope.pop("type", None)
    rope.setdefault("rope_theta", config.get("rope_local_base_freq" if local else "rope_theta", 10000.0))
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None and not local:
            rope.setdefault(key, config[key])
    return rope


# Numbers of a stretched rotary embedding, and the least that each may be.
_ROPE_NUMBERS = {
    "factor": 0.0, "original_max_position_embeddings": 1.0, "extrapolation_factor": 0.0, "attention_factor": 0.0,
    "beta_fast": 0.0, "beta_slow": 0.0,
}  # fmt: skip


def full_rope(config: Config) -> dict[str, Any]:
    """The rotary settings of layers that see the whole context, from a complete configuration."""
    rope: dict[str, Any] = config["rope_parameters"]
    return dict(rope.get("full_attention", rope))


def problems_of(config: Config, given: Config, family: Family) -> list[str]:
    """Everything about a complete configuration that llama.cpp would compute otherwise.

    Args:
        given: the file's own.
    """
    needed = [key for key, kind in {**KINDS, **family.kinds}.items() if not kind.endswith("?")]
    wrong = config.get(WRONG) or [*_wrong(config, family, needed)]
    if wrong:
        return wrong
    shared = [*_sizes(config), *_ropes(config, given)]
    return [*shared, *_features(config, family), *([] if shared else family.problems(config))]


def _sizes(config: Config) -> list[str]:
    heads, heads_kv = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    types = config.get("layer_types")
    checks = (
        (
            config.get("head_dim") is not None or config["hidden_size"] % heads == 0,
            f"hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads}",
        ),
        (head_dim(config) % 2 == 0, f"head_dim is {head_dim(config)}, expected an even number"),
        (heads % heads_kv == 0, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {heads_kv}"),
        (
            types is None or len(types) == config["num_hidden_layers"],
            f"layer_types has {len(types or ())} entries for {config['num_hidden_layers']} layers",
        ),
        (
            (config.get("num_experts_per_tok") or 0) <= (config.get("num_experts") or 2**31),
            f"num_experts_per_tok {config.get('num_experts_per_tok')} exceeds num_experts {config.get('num_experts')}",
        ),
    )
    return [problem for ok, problem in checks if not ok]


def _features(config: Config, family: Family) -> list[str]:
    named = [key for key in ("hidden_act", "hidden_activation", "activation_function", "activation") if key in config]
    wanted = " or ".join(map(repr, family.activations))
    wrong = [f"{key} is {config[key]!r}, expected {wanted}" for key in named if config[key] not in family.activations]
    return wrong + [
        f"{key} is {config[key]!r}, and llama.cpp's {family.architecture} computes {expected!r}"
        for key, expected in family.fixed.items()
        if key in config and config[key] != expected
    ]


def _ropes(config: Config, given: Config) -> list[str]:
    old, new = given.get("rope_scaling"), given.get("rope_parameters")
    found = []
    if old and new and isinstance(old, dict) and isinstance(new, dict) and _form(old) != _form(new):
        found.append(f"rope_scaling {old} and rope_parameters {new} differ; delete the one it was not trained with")
    ropes = config["rope_parameters"]
    if odd := [kind for kind in LAYER_KINDS if not isinstance(ropes.get(kind, {}), dict)]:
        return [f"rope_parameters: {kind} is {ropes[kind]!r}, expected an object" for kind in odd]
    for rope in ropes.values() if "full_attention" in ropes else (ropes,):
        found += _one_ropes(rope)
    return found


def _form(given: Config) -> dict[str, Any]:
    """What two ways to write the same rotary settings have in common."""
    ours = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
    form = {key: value for key, value in given.items() if key not in ours}
    return {**form, "rope_type": given.get("rope_type", given.get("type")) or "default"}


def _one_ropes(rope: Config) -> list[str]:
    kind = rope["rope_type"]
    missing = [key for key in ROPE_TYPES.get(str(kind), ()) if not is_number(rope.get(key))]
    share = rope.get("partial_rotary_factor", 1.0)
    numbers = ((key, rope[key], least) for key, least in _ROPE_NUMBERS.items() if key in rope)
    odd = [f"{key} {value!r}" for key, value, least in numbers if not (is_number(value) and value >= least)]
    checks = (
        (is_number(rope["rope_theta"]), f"rope_theta is {rope['rope_theta']!r}, expected a positive number"),
        (not missing, f"rope_type {kind!r} lacks {', '.join(missing)}"),
        (
            kind != "llama3" or missing or rope["low_freq_factor"] < rope["high_freq_factor"],
            f"low_freq_factor {rope.get('low_freq_factor')} is not below "
            f"high_freq_factor {rope.get('high_freq_factor')}",
        ),
        (not odd, f"rope_parameters has {', '.join(odd)}, expected positive numbers"),
        (is_number(share) and share <= 1, f"partial_rotary_factor is {share!r}, expected a number above 0, at most 1"),
    )
    return [problem for ok, problem in checks if not ok]


YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp reads no others (src/llama-hparams.h)


def _yarn_problems(rope: Config) -> list[str]:
    """How llama.cpp scales what YaRN rotates follows from the factor alone (src/llama-context.cpp)."""
    return yarn_scale_problems(rope, yarn_scale(rope["factor"], 1.0)) + [
        f"YaRN's {key} is {rope[key]}, and llama.cpp takes {usual}"
        for key, usual in YARN_BETAS.items()
        if rope.get(key) and rope[key] != usual
    ]


def yarn_scale_problems(rope: Config, wanted: float) -> list[str]:
    """Where transformers scales what YaRN rotates otherwise (`_compute_yarn_parameters`, modeling_rope_utils.py)."""
    factor, mscale, all_dim = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    if odd := [value for value in (mscale, all_dim) if value and not is_number(value)]:
        return [f"YaRN's mscale and mscale_all_dim: {odd[0]!r} is no positive number"]
    usual = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim) if mscale and all_dim else yarn_scale(factor, 1.0)
    scale = usual if rope.get("attention_factor") is None else rope["attention_factor"]
    same = math.isclose(scale, wanted, rel_tol=1e-6)
    return [] if same else [f"YaRN's attention_factor is {scale}, and llama.cpp takes {wanted}"]


def yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def usual_head_dim(config: Config) -> list[str]:
    """A check for families whose heads llama.cpp takes to fill hidden_size."""
    usual = config["hidden_size"] // config["num_attention_heads"]
    own = f"head_dim is {head_dim(config)}, and llama.cpp takes hidden_size / num_attention_heads, {usual}"
    return [] if head_dim(config) * config["num_attention_heads"] == config["hidden_size"] else [own]


def window_notices(config: Config) -> list[str]:
    """For families whose sliding window llama.cpp does not apply."""
    window = config.get("sliding_window")
    if isinstance(window, int) and window < (config.get("max_position_embeddings") or 0):
        return [f"sliding_window {window} is not applied by llama.cpp: equal up to {window} tokens of context"]
    return []


def rope_type_problems(*known: str) -> Callable[[Config], list[str]]:
    """A family's check that the rotary embedding is one that its graph in llama.cpp knows."""

    def problems(config: Config) -> list[str]:
        rope = full_rope(config)
        if rope["rope_type"] not in known:
            return [f"rope_type is {rope['rope_type']!r}, known are {', '.join(known)}"]
        return _yarn_problems(rope) if rope["rope_type"] == "yarn" else []

    return problems


def whole_rope(config: Config) -> list[str]:
    """A check for families whose every value of a head is rotated."""
    share = full_rope(config).get("partial_rotary_factor") or 1.0
    return [] if share == 1.0 else [f"partial_rotary_factor is {share}, expected 1"]


def head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotary_dim(config: Config) -> int:
    """How many values of a head are rotated."""
    return int(head_dim(config) * full_rope(config).get("partial_rotary_factor", 1.0))


def _first(config: Config, *names: str) -> Any:
    return next((config[name] for name in names if name in config), None)


# Metadata key, and the settings it is read from; the first that is there counts.
_WHOLES = (
    ("context_length", ("max_position_embeddings", "n_positions")),
    ("embedding_length", ("hidden_size",)),
    ("feed_forward_length", ("intermediate_size",)),
    ("attention.head_count", ("num_attention_heads",)),
    ("attention.head_count_kv", ("num_key_value_heads",)),
    ("expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("expert_used_count", ("num_experts_per_tok", "top_k_experts")),
    ("expert_group_count", ("n_group",)),
    ("expert_group_used_count", ("topk_group",)),
)
_NUMBERS = (
    ("attention.layer_norm_rms_epsilon", ("rms_norm_eps", "norm_eps")),
    ("attention.layer_norm_epsilon", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
)
_YARN = (
    ("ext_factor", "extrapolation_factor"),
    ("attn_factor", "attention_factor"),
    ("beta_fast", "beta_fast"),
    ("beta_slow", "beta_slow"),
)


def common(config: Config) -> dict[str, Any]:
    """The metadata of a complete configuration, without the architecture before each key."""
    values: dict[str, Any] = {"block_count": config["num_hidden_layers"]}
    values |= {key: int(value) for key, names in _WHOLES if (value := _first(config, *names)) is not None}
    values |= {key: float(value) for key, names in _NUMBERS if (value := _first(config, *names)) is not None}
    if config.get("head_dim") is not None:
        values |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    return values | rope_metadata(config)


def rope_metadata(config: Config) -> dict[str, Any]:
    rope = full_rope(config)
    values: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if local := config["rope_parameters"].get("sliding_attention"):
        values["rope.freq_base_swa"] = float(local["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        for key, name in _YARN:
            if rope.get(name) is not None:
                values[f"rope.scaling.yarn_{key}"] = float(rope[name])
    if rope["rope_type"] in ("su", "longrope"):
        values["rope.scaling.type"] = "longrope"
    return values


def theta_unless_usual(config: Config) -> dict[str, Any]:
    """`rope.freq_base` where llama.cpp would take another: its converter leaves it out for some families."""
    theta = float(full_rope(config)["rope_theta"])
    return {} if theta == 10000.0 else {"rope.freq_base": theta}


def llama3_factors(config: Config) -> dict[str, npt.NDArray[np.float32]]:
    """`rope_freqs`: what Llama 3 divides its rotary frequencies by (transformers: `_compute_llama3_parameters`)."""
    rope = full_rope(config)
    if rope["rope_type"] != "llama3":
        return {}
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    old_context = float(rope["original_max_position_embeddings"])
    # In float32 at every step, a number by a tensor as torch divides it: the reciprocal, times the number. But powers
    # in double precision: torch's are the nearest float32 nearly always, numpy's own float32 ones often not.
    steps = np.arange(0, head_dim(config), 2, dtype=np.float32) / np.float32(head_dim(config))
    frequencies = np.float32(1.0) / np.power(float(rope["rope_theta"]), steps.astype(np.float64)).astype(np.float32)
    factors, one = [], np.float32(1)
    for wavelength in one / frequencies * np.float32(2 * math.pi):
        if wavelength < old_context / high or wavelength > old_context / low:
            factors.append(1.0 if wavelength < old_context / high else factor)
            continue
        smooth = (one / wavelength * np.float32(old_context) - np.float32(low)) / np.float32(high - low)
        factors.append(float(one / ((one - smooth) / np.float32(factor) + smooth)))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def sliding_layers(config: Config) -> list[bool]:
    return [kind == "sliding_attention" for kind in config["layer_types"]]


def restored_windows(stored: Stored, found: Config) -> dict[str, Any]:
    """Which layers see a window, of families whose files say it layer by layer."""
    layers = stored["attention.sliding_window_pattern"] or [False] * found["num_hidden_layers"]
    kinds = ["sliding_attention" if is_local else "full_attention" for is_local in layers]
    return {"sliding_window": stored["attention.sliding_window"], "layer_types": kinds}
