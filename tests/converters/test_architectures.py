"""The tables name every tensor as both sides do, and every configuration gives sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.architectures import FAMILIES, MODEL_TYPES, MODELS, Config, Family, Sizes, find_family, find_gguf_family
from converters.architectures.family import every_second, grouped_rows, interleaved_rows, part_of_each
from converters.architectures.settings import complete, problems_of
from converters.errors import FormatError, UnsupportedArchitectureError
from converters.placement import is_known, places_of

SMALL = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 16,
         "num_key_value_heads": 4, "vocab_size": 300, "original_max_position_embeddings": 128}  # fmt: skip
# Names that the gguf package does not know, though llama.cpp's converter writes them under these rows' names.
UNKNOWN_TO_GGUF = ("qkv_proj", "up_gate_proj", "in_proj_qkvz", "layernorm.norms")


def configured(name: str) -> tuple[Family, Config, Sizes]:
    family = FAMILIES[name]
    config = complete({"architectures": [name], **SMALL}, family)
    metadata = {f"{family.architecture}.{key}": value for key, value in family.hyperparameters(config).items()}
    return family, config, Sizes(family.architecture, config["vocab_size"], metadata)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_with_nothing_but_sizes_is_enough(name: str) -> None:
    family, config, sizes = configured(name)
    for place in family.places(sizes, config):
        assert all(size > 0 for size in (*place.shape(sizes), *place.hf_shape(sizes)))
        assert place.hf_names(sizes)
    assert isinstance(problems_of(config, SMALL, family), list)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_matrix_leads_back_to_itself(name: str) -> None:
    family, config, sizes = configured(name)
    for place in family.places(sizes, config):
        if place.row.is_linear:
            found = {(each.layer, each.is_bias, each.row) for each, _ in places_of(family, place.hf_names(sizes)[0])}
            assert (place.layer, place.is_bias, place.row) in found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_are_those_of_the_gguf_package(name: str) -> None:
    family, config, sizes = configured(name)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.architecture)
    theirs = gguf.get_tensor_name_map(architecture, sizes["layers"])
    known = 0
    for place in family.places(sizes, config):
        hf_name = place.hf_names(sizes)[0]
        if not place.row.is_linear or any(part in hf_name for part in UNKNOWN_TO_GGUF):
            continue
        assert theirs.get_name(hf_name, try_suffixes=(".weight", ".bias")) == place.gguf_name
        known += 1
    assert known > 5


@pytest.mark.parametrize("name", FAMILIES)
def test_orders_take_rows_that_are_there_and_none_twice(name: str) -> None:
    family, config, sizes = configured(name)
    for place in family.places(sizes, config):
        stored = (
            int(np.prod(place.hf_shape(sizes)[:-1])) if len(place.hf_shape(sizes)) > 1 else place.hf_shape(sizes)[0]
        )
        if place.row.transposed:
            stored = int(np.prod([*place.hf_shape(sizes)[:-2], place.hf_shape(sizes)[-1]]))
        for order, size in ((place.row_order(sizes), stored), (place.column_order(sizes), place.hf_shape(sizes)[-1])):
            if order is not None:
                assert len(np.unique(order)) == len(order)
                assert order.min() >= 0
                assert order.max() < size


def test_every_family_has_its_model_type_and_its_models() -> None:
    assert set(FAMILIES) == set(MODEL_TYPES) == set(MODELS)


def test_row_orders() -> None:
    order = interleaved_rows(4, 8)
    assert sorted(order.tolist()) == list(range(32))
    assert order[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    rows = np.arange(32)
    np.testing.assert_array_equal(rows[order][np.argsort(order)], rows)
    assert grouped_rows(2, (2, 1), (0, 1)).tolist() == [0, 1, 3, 4, 2, 5]
    assert grouped_rows(2, (2, 1), (1,)).tolist() == [2, 5]
    assert part_of_each(2, 4, 1, 3).tolist() == [1, 2, 5, 6]
    assert every_second(5, 1).tolist() == [1, 3]


@pytest.mark.parametrize("name", ["model.norm.scale", "norm.weight", "model.layers.1.mlp.weight", ""])
def test_other_names_have_no_place(name: str) -> None:
    assert not is_known(FAMILIES["LlamaForCausalLM"], name)


def test_an_unknown_family_is_named_with_its_nearest() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'lama'; the nearest known one is llama") as caught:
        find_gguf_family("lama", Path("x.gguf"))
    assert "converters/architectures" in caught.value.hint
    with pytest.raises(
        UnsupportedArchitectureError, match=r"Qwen2Causal.*nearest known one is Qwen2ForCausalLM.*own.py"
    ):
        find_family({"architectures": ["Qwen2Causal"], "auto_map": {"AutoModelForCausalLM": "own.py"}}, Path("x"))


def test_sizes_that_are_missing_are_named() -> None:
    with pytest.raises(FormatError, match=r"llama\.block_count is None"):
        Sizes("llama", 10, {"llama.embedding_length": 8, "llama.attention.head_count": 2})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        ),
    ],
)
def test_the_ways_to_write_rotary_settings(given: dict[str, Any], expected: dict[str, Any]) -> None:
    config = complete({**SMALL, "original_max_position_embeddings": None, **given}, FAMILIES["LlamaForCausalLM"])
    assert config["rope_parameters"] == expected


def test_layers_with_rotary_settings_of_their_own() -> None:
    older = {"rope_theta": 1e6, "rope_local_base_freq": 10000, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    newer = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
        }
    }
    plain = {key: value for key, value in SMALL.items() if key != "original_max_position_embeddings"}
    one, two = (complete({**plain, **given}, FAMILIES["Gemma3ForCausalLM"]) for given in (older, newer))
    assert one["rope_parameters"] == two["rope_parameters"]
