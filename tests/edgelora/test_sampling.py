"""Sampling settings: bounds, defaults, and one message for all problems."""

from __future__ import annotations

from typing import Any

import pytest

from edgelora.errors import SettingsError
from edgelora.sampling import Sampling


def test_none_means_not_given_and_defaults_are_laid_under() -> None:
    contract = Sampling.from_mapping({"temperature": 0.2, "stop": "END"})
    assert Sampling.from_mapping({"temperature": None, "top_k": 5}, contract) == Sampling(
        temperature=0.2, top_k=5, stop=("END",)
    )


def test_changes_round_trip() -> None:
    sampling = Sampling(temperature=0.0, stop=("a",), seed=3)
    assert sampling.changes() == {"temperature": 0.0, "stop": ["a"], "seed": 3}
    assert Sampling.from_mapping(sampling.changes()) == sampling


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": 1.5},
        {"top_p": 0},
        {"min_p": 1},
        {"seed": -1},
        {"seed": 2**32},
        {"max_tokens": 0},
        {"stop": [""]},
        {"stop": 3},
        {"temprature": 1},
    ],
)
def test_refused_by_name(values: dict[str, object]) -> None:
    with pytest.raises(SettingsError) as caught:
        Sampling.from_mapping(values)
    assert next(iter(values)) in caught.value.message


def test_all_problems_at_once() -> None:
    with pytest.raises(SettingsError, match=r"temperature.*top_p"):
        Sampling(temperature=-1, top_p=3)


@pytest.mark.parametrize("value", [{"top_k": 2**31}, {"repeat_penalty": 0.01}, {"repeat_penalty": 11}, {1: 2}])
def test_what_llama_cpp_cannot_count_or_divide_by_is_refused(value: Any) -> None:
    with pytest.raises(SettingsError):
        Sampling.from_mapping(value)


def test_twin_the_bounds_themselves_are_fine() -> None:
    assert Sampling(top_k=2**31 - 1, repeat_penalty=0.1).repeat_penalty == 0.1
