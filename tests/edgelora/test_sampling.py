"""Sampling settings: bounds, defaults, and one message for all problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelora.errors import DataFileError, SettingsError
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
        {"presence_penalty": -2.1},
        {"frequency_penalty": 3},
        {"repeat_last_n": -1},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {3: 101}},
        {"logit_bias": [3]},
        {"grammar": 3},
        {"grammar": 'root ::= "a'},
        {"schema": "object"},
        {"schema": {"not": {}}},
        {"schema": {"const": float("nan")}},
        {"logprobs": 21},
        {"logprobs": True},
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
    with pytest.raises(SettingsError, match=r"temperature.*top_p.*presence_penalty"):
        Sampling(temperature=-1, top_p=3, presence_penalty=9)
    with pytest.raises(SettingsError, match=r"grammar, line 1.*grammar and schema|grammar and schema.*grammar, line 1"):
        Sampling(grammar="root ::= (", schema={})


SCHEMA: dict[str, Any] = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}}


def test_biases_and_a_schema_round_trip_through_json() -> None:
    sampling = Sampling(logit_bias={7: -100, 5: 1.5}, schema=SCHEMA, logprobs=0, repeat_last_n=0)
    text = json.dumps(sampling.changes())
    assert json.loads(text)["logit_bias"] == {"7": -100, "5": 1.5}
    assert Sampling.from_mapping(json.loads(text)) == sampling
    assert Sampling(logit_bias={}, logprobs=None, schema=None).changes() == {}


def test_settings_do_not_change_with_what_they_were_made_of() -> None:
    schema, bias = json.loads(json.dumps(SCHEMA)), {1: 2.0}
    sampling = Sampling(schema=schema, logit_bias=bias)
    before = hash(sampling), sampling.gbnf
    schema["properties"]["b"]["type"] = "string"
    bias[1] = 3.0
    assert (hash(sampling), sampling.gbnf, sampling.logit_bias) == (*before, {1: 2.0})


def test_a_grammar_takes_the_place_of_a_default_schema() -> None:
    default = Sampling(schema=SCHEMA)
    grammar = 'root ::= "a"'
    assert Sampling.from_mapping({"grammar": grammar}, default).gbnf == grammar
    assert Sampling.from_mapping({"top_k": 1}, default).schema == SCHEMA
    with pytest.raises(SettingsError, match="both"):
        Sampling.from_mapping({"grammar": grammar, "schema": SCHEMA})
    assert Sampling().gbnf is None


def test_files_of_the_command_line_are_read(tmp_path: Path) -> None:
    from edgelora.cli.options import sampling_of

    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.gbnf"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('root ::= "a"\n')
    assert sampling_of({"schema": schema}) == {"schema": SCHEMA}
    assert sampling_of({"grammar": grammar}) == {"grammar": 'root ::= "a"\n'}
    with pytest.raises(DataFileError, match="not JSON"):
        sampling_of({"schema": grammar})
    with pytest.raises(DataFileError, match="cannot be read"):
        sampling_of({"grammar": tmp_path / "missing"})
    with pytest.raises(SettingsError, match="line 1"):
        sampling_of({"grammar": schema})
    schema.write_text("[]")
    with pytest.raises(DataFileError, match="an object, this is list"):
        sampling_of({"schema": schema})


@pytest.mark.parametrize("value", [{"top_k": 2**31}, {"repeat_penalty": 0.01}, {"repeat_penalty": 11}, {1: 2}])
def test_what_llama_cpp_cannot_count_or_divide_by_is_refused(value: Any) -> None:
    with pytest.raises(SettingsError):
        Sampling.from_mapping(value)


def test_twin_the_bounds_themselves_are_fine() -> None:
    assert Sampling(top_k=2**31 - 1, repeat_penalty=0.1).repeat_penalty == 0.1
