"""The config.json of released models is taken, and means what its publisher meant."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from converters.architectures import Config, Family, Sizes, find_family
from converters.architectures.settings import complete, flatten, problems_of
from converters.errors import FormatError
from converters.model import PUBLISHED_WITH_CODE
from tests.converters.released_models import PARAMETERS, REFUSED, RELEASED, Facts, every


def read(facts: Facts, **settings: Any) -> tuple[Family, Config, list[str]]:
    """A configuration as the converter reads it, and what is wrong with it; settings go where the text model's are."""
    inner = {"text_config": {**facts["text_config"], **settings}} if "text_config" in facts else settings
    flat = flatten({**facts, **inner})
    family = find_family(flat, Path("model"))
    config = complete(flat, family)
    return family, config, problems_of(config, flat, family)


def metadata(family: Family, config: Config) -> dict[str, Any]:
    return {f"{family.architecture}.{key}": value for key, value in family.hyperparameters(config).items()}


def parameters(facts: Facts) -> int:
    family, config, _ = read(facts)
    sizes, tied = Sizes(family.architecture, config["vocab_size"], metadata(family, config)), config.get(
        "tie_word_embeddings", False
    )  # fmt: skip
    tensors = {
        place.gguf_name: math.prod(place.shape(sizes))
        for place in family.places(sizes, config)
        if not (tied and place.row.absent_if_tied)
    }
    return sum(tensors.values())


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_is_taken(name: str) -> None:
    family, config, problems = read(RELEASED[name])
    assert problems == []
    assert metadata(family, config)
    assert parameters(RELEASED[name]) > 50_000_000


@pytest.mark.parametrize("name", PARAMETERS)
def test_its_tensors_are_as_many_parameters_as_are_published(name: str) -> None:
    assert parameters(RELEASED[name]) == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name, facts in RELEASED.items() if "auto_map" in facts])
def test_code_that_was_published_beside_it_is_no_reason_to_refuse(name: str) -> None:
    assert RELEASED[name]["architectures"][0] in PUBLISHED_WITH_CODE


def test_another_size_would_be_seen() -> None:
    assert parameters({**RELEASED["Qwen/Qwen3-8B"], "head_dim": 64}) != PARAMETERS["Qwen/Qwen3-8B"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_released_model_that_is_refused_by_name(name: str) -> None:
    facts, said = REFUSED[name]
    *_, problems = read(facts)
    for what in said:
        assert any(what in problem for problem in problems), (what, problems)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("meta-llama/Llama-3.2-1B", {"rope.dimension_count": 64, "attention.key_length": 64}),
        ("mistralai/Mistral-Nemo-Instruct-2407", {"rope.dimension_count": 128, "attention.head_count_kv": 8}),
        ("Qwen/Qwen3-30B-A3B", {"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768}),
        ("google/gemma-3-4b-pt", {"attention.head_count": 8, "attention.head_count_kv": 4, "context_length": 131072,
                                  "rope.scaling.factor": 8.0, "rope.freq_base": 1e6, "rope.freq_base_swa": 10000.0}),
        ("google/gemma-4-26B-A4B", {"attention.head_count_kv": [8, 8, 8, 8, 8, 2] * 5, "attention.key_length": 512}),
        ("google/gemma-4-E2B", {"feed_forward_length": [6144] * 15 + [12288] * 20, "attention.shared_kv_layers": 20}),
        ("microsoft/phi-2", {"rope.dimension_count": 32}),
        ("microsoft/phi-4", {"attention.sliding_window": 0, "rope.scaling.original_context_length": 16384}),
        ("microsoft/Phi-4-mini-instruct", {"rope.dimension_count": 96}),
        ("tiiuae/falcon-7b", {"attention.head_count_kv": 1}),
        ("tiiuae/falcon-40b", {"attention.head_count_kv": 8}),
        ("CohereLabs/c4ai-command-r-v01", {"context_length": 131072}),
        ("stabilityai/stablelm-2-12b", {"use_parallel_residual": True, "rope.dimension_count": 40}),
        ("stabilityai/stablelm-3b-4e1t (first)", {"rope.dimension_count": 20, "attention.layer_norm_epsilon": 1e-5}),
        ("Qwen/Qwen2.5-7B-Instruct (YaRN)", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}),
    ],
)  # fmt: skip
def test_what_a_configuration_means(name: str, values: dict[str, Any]) -> None:
    family, config, _ = read(RELEASED[name])
    assert {key: family.hyperparameters(config)[key] for key in values} == values


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mistralai/Mistral-7B-v0.1", "sliding_window 4096"),
        ("HuggingFaceH4/zephyr-7b-beta", "sliding_window 4096"),
        ("microsoft/Phi-3-mini-4k-instruct", "sliding_window 2047"),
        ("bigcode/starcoder2-3b", "sliding_window 4096"),
        ("microsoft/Phi-3.5-mini-instruct", "from token 4097 on"),
        ("openai/gpt-oss-20b", "truncate"),
    ],
)
def test_what_is_equal_up_to_a_point_is_said(name: str, said: str) -> None:
    family, config, _ = read(RELEASED[name])
    [notice] = family.notices(config)
    assert said in notice


def test_a_window_that_transformers_fills_in_is_said() -> None:
    facts = {key: value for key, value in RELEASED["mistralai/Mistral-7B-v0.3"].items() if key != "sliding_window"}
    family, config, _ = read(facts)
    assert "sliding_window 4096" in family.notices(config)[0]


@pytest.mark.parametrize(
    "name", ["mistralai/Mistral-7B-Instruct-v0.2", "microsoft/phi-4", "Qwen/Qwen2-7B", "google/gemma-4-31B"]
)
def test_and_nothing_is_said_where_all_is_equal(name: str) -> None:
    family, config, _ = read(RELEASED[name])
    assert family.notices(config) == []


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
# Settings that llama.cpp computes otherwise, or whose file it would not load: test_released_shapes.py shows that.
CHANGED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("google/gemma-2-27b", {"query_pre_attn_scalar": 128}, "query_pre_attn_scalar is 128"),
    ("google/gemma-2-9b", {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar is 224"),
    ("google/gemma-2-2b", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
    ("google/gemma-2-2b", {"final_logit_softcapping": None}, "final_logit_softcapping is None"),
    ("google/gemma-2-2b", {"sliding_window": None}, "sliding_window is None"),
    ("google/gemma-2-2b", {"layer_types": ["full_attention"] * 26}, "layer_types"),
    ("google/gemma-3-27b-pt", {"query_pre_attn_scalar": 128}, "query_pre_attn_scalar is 128"),
    ("google/gemma-3-1b-pt", {"sliding_window_pattern": 2}, "layer_types"),
    ("google/gemma-3-1b-pt", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("google/gemma-4-31B", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
    ("google/gemma-4-E2B", {"num_kv_shared_layers": 19}, "num_kv_shared_layers is 19"),
    ("google/gemma-4-31B", {"layer_types": ["full_attention"] * 59 + ["sliding_attention"]}, "the last layer"),
    ("google/gemma-4-31B", {"attention_k_eq_v": False}, "num_global_key_value_heads"),
    ("LGAI-EXAONE/EXAONE-4.0-32B", {"sliding_window_pattern": "LLG", "layer_types": every(3, 64)}, "sliding window"),
    ("LGAI-EXAONE/EXAONE-4.0-32B", {"num_hidden_layers": 60, "layer_types": every(4, 60)}, "sliding window"),
    ("LGAI-EXAONE/EXAONE-4.0-1.2B", {"head_dim": 128}, "head_dim is 128"),
    ("CohereLabs/c4ai-command-r-plus", {"num_hidden_layers": 40}, "use_qk_norm is True"),
    ("CohereLabs/c4ai-command-r-v01", {"num_hidden_layers": 64}, "use_qk_norm is False"),
    ("CohereLabs/c4ai-command-r7b-12-2024", {"sliding_window_pattern": 2}, "layer_types"),
    ("CohereLabs/c4ai-command-r7b-12-2024", {"head_dim": 64}, "head_dim is 64"),
    ("allenai/OLMo-2-0425-1B", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ("allenai/OLMo-2-0425-1B", {"head_dim": 64}, "head_dim is 64"),
    ("allenai/Olmo-3-1025-7B", {"rope_theta": 10000}, "rope_theta"),
    ("allenai/Olmo-3-1025-7B", {"sliding_window": None}, "sliding_window is None"),
    ("stabilityai/stablelm-2-1_6b", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ("EleutherAI/pythia-70m", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ("Qwen/Qwen1.5-MoE-A2.7B", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ("openai/gpt-oss-20b", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ("openai/gpt-oss-20b", {"layer_types": ["full_attention"] * 24}, "layer_types"),
    ("openai/gpt-oss-20b", {"sliding_window": None}, "sliding_window is None"),
    ("Qwen/Qwen1.5-MoE-A2.7B", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ("Qwen/Qwen3-30B-A3B", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ("Qwen/Qwen2.5-0.5B", {"head_dim": 128}, "head_dim is 128"),
    ("bigcode/starcoder2-3b", {"use_bias": False}, "use_bias is False"),
    ("bigcode/starcoder2-3b", {"head_dim": 64}, "head_dim is 64"),
    ("HuggingFaceTB/SmolLM3-3B", {"attention_bias": True}, "attention_bias is True"),
    ("HuggingFaceTB/SmolLM3-3B", {"mlp_bias": True}, "mlp_bias is True"),
    ("HuggingFaceTB/SmolLM3-3B", {"no_rope_layers": [1] * 36}, "no_rope_layers"),
    ("HuggingFaceTB/SmolLM3-3B", {"no_rope_layers": None, "no_rope_layer_interval": 3}, "no_rope_layers"),
    ("HuggingFaceTB/SmolLM3-3B", {"rope_scaling": {**YARN, "type": "llama3", "low_freq_factor": 1.0,
                                                   "high_freq_factor": 4.0}}, "rope_type is 'llama3'"),
    ("Qwen/Qwen2.5-7B", {"rope_scaling": {**YARN, "attention_factor": 1.0}}, "attention_factor is 1.0"),
    ("Qwen/Qwen2.5-7B", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, "attention_factor is 1.0"),
    ("Qwen/Qwen2.5-7B", {"rope_scaling": {**YARN, "beta_fast": 16.0}}, "beta_fast is 16.0"),
    ("microsoft/Phi-3-mini-4k-instruct", {"head_dim": 64}, "head_dim is 64"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "said"), CHANGED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, settings: dict[str, Any], said: str) -> None:
    *_, problems = read(RELEASED[name], **settings)
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Qwen/Qwen2.5-7B", {"rope_scaling": {**YARN, "attention_factor": 0.1 * math.log(4) + 1}}),
        ("Qwen/Qwen2.5-7B", {"rope_scaling": {**YARN, "beta_fast": 32, "beta_slow": 1}}),
        ("HuggingFaceTB/SmolLM3-3B", {"no_rope_layers": None}),
        ("google/gemma-4-31B", {"use_bidirectional_attention": None}),
        ("google/gemma-4-31B", {"hidden_size_per_layer_input": None}),
        ("google/gemma-3-1b-pt", {"layer_types": every(6, 26)}),
        ("mistralai/Mistral-7B-v0.3", {"head_dim": None}),
    ],
)
def test_other_ways_to_say_the_same_are_taken(name: str, settings: dict[str, Any]) -> None:
    *_, problems = read(RELEASED[name], **settings)
    assert problems == []


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-v0.1", "baidu/ERNIE-4.5-0.3B-PT"])
def test_null_is_not_the_same_as_a_key_left_out(name: str) -> None:
    """transformers fills in its default for a key that is absent; null it takes for none, or for what follows."""
    facts = {key: value for key, value in RELEASED[name].items() if key not in ("num_key_value_heads", "head_dim")}
    _, absent, _ = read(facts)
    _, null, _ = read({**facts, "num_key_value_heads": None, "head_dim": None})
    assert absent["num_key_value_heads"] < absent["num_attention_heads"] == null["num_key_value_heads"]


def test_keys_that_nothing_reads_are_not_asked_for() -> None:
    """Gemma 4 E2B: the checkpoint has keys and values for layers that take those of an earlier one."""
    family, config, _ = read(RELEASED["google/gemma-4-E2B"])
    sizes = Sizes(family.architecture, config["vocab_size"], metadata(family, config))
    keys = {place.layer: place.is_needed for place in family.places(sizes, config) if place.row.gguf.endswith("attn_k")}
    assert [layer for layer, needed in keys.items() if needed] == list(range(15))
    assert len(keys) == 35


def test_a_model_type_that_contradicts_the_class() -> None:
    with pytest.raises(FormatError, match="model_type is 'llama'"):
        read({**RELEASED["Qwen/Qwen3-8B"], "model_type": "llama"})
