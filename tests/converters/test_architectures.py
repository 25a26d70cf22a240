"""The tables name every tensor as both sides do."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from converters.architectures import FAMILIES, MODEL_TYPES, Dimensions, find_gguf_family
from converters.architectures.family import interleaved_rows
from converters.errors import FormatError, UnsupportedArchitectureError

BIASED = {"attention_bias": True, "mlp_bias": True}
SIZES = Dimensions("llama", vocab=300, embedding=32, feed_forward=48, layers=3, heads=4, heads_kv=2, head_dim=8)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_leads_back_to_itself(name: str) -> None:
    family = FAMILIES[name]
    places = list(family.places(SIZES, BIASED))
    assert len({place.gguf_name for place in places}) == len(places)
    for place in places:
        assert family.from_hf(place.hf_name) == place


def test_every_family_has_its_model_type() -> None:
    assert set(FAMILIES) == set(MODEL_TYPES)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_are_those_of_the_gguf_package(name: str) -> None:
    family = FAMILIES[name]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.architecture)
    theirs = gguf.get_tensor_name_map(architecture, SIZES.layers)
    for place in family.places(SIZES, BIASED):
        assert theirs.get_name(place.hf_name, try_suffixes=(".weight", ".bias")) == place.gguf_name


def test_row_orders_are_permutations_that_can_be_undone() -> None:
    order = interleaved_rows(4, 8)
    assert sorted(order.tolist()) == list(range(32))
    assert order[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    rows = np.arange(32)
    np.testing.assert_array_equal(rows[order][np.argsort(order)], rows)


@pytest.mark.parametrize("name", ["model.norm", "model.norm.scale", "norm.weight", "model.layers.1.mlp.weight", ""])
def test_other_names_have_no_place(name: str) -> None:
    assert FAMILIES["LlamaForCausalLM"].from_hf(name) is None


def test_an_unknown_family_is_named_with_its_nearest() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'lama'.*the nearest is llama") as caught:
        find_gguf_family("lama", Path("x.gguf"))
    assert "converters/architectures" in caught.value.hint


def test_sizes_that_are_missing_are_named() -> None:
    with pytest.raises(FormatError, match=r"llama\.attention\.head_count is None"):
        Dimensions.from_metadata({"general.architecture": "llama", "llama.embedding_length": 8}, 10)
