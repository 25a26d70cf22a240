"""The contract survives the way through GGUF metadata and through JSON, and refuses what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelora.contract import FILE_NAME, Contract
from edgelora.errors import ModelFileError

FULL = Contract(
    base_name="tiny-base",
    base_fingerprint="ab" * 32,
    chat_template="{{ messages }}",
    golden_messages=({"role": "user", "content": "é\n"},),
    golden_tokens=(1, 2, 300),
    stop=("\n\n", "###"),
    sampling={"temperature": 0.0},
    system="Be kind.",
    training={"method": "lora", "rank": 16},
    exactness={"kind": "exact"},
)


def test_through_metadata() -> None:
    assert Contract.from_metadata(FULL.to_metadata()) == FULL


def test_through_a_folder(tmp_path: Path) -> None:
    FULL.save(tmp_path)
    assert Contract.load(tmp_path) == FULL
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_empty_fields_are_not_written() -> None:
    assert Contract().to_metadata() == {"edgelora.contract.version": 1}


def test_no_contract(tmp_path: Path) -> None:
    assert Contract.from_metadata({"general.architecture": "llama"}) is None
    assert Contract.load(tmp_path) is None


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_an_unknown_version_is_refused(tmp_path: Path, version: object) -> None:
    with pytest.raises(ModelFileError, match=f"version {version}"):
        Contract.from_metadata({**FULL.to_metadata(), "edgelora.contract.version": version})
    (tmp_path / FILE_NAME).write_text(json.dumps({"version": version}))
    with pytest.raises(ModelFileError, match=f"version {version}"):
        Contract.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("edgelora.golden.messages", "{"),
        ("edgelora.golden.tokens", ["x"]),
        ("edgelora.sampling", "[]"),
        ("edgelora.stop", [3]),
    ],
)
def test_a_damaged_field_is_named(key: str, value: object) -> None:
    with pytest.raises(ModelFileError, match="damaged"):
        Contract.from_metadata({**FULL.to_metadata(), key: value})


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1, "colour": "red"}', '{"version": 1, "stop": [1]}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ModelFileError, match=FILE_NAME):
        Contract.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("edgelora.stop", "abc"),
        ("edgelora.golden.tokens", "12"),
        ("edgelora.golden.tokens", [True]),
        ("edgelora.golden.messages", '{"role": "user"}'),
        ("edgelora.training", "[" * 100_000),
    ],
)
def test_a_field_of_another_type_is_damage(key: str, value: Any) -> None:
    with pytest.raises(ModelFileError, match="its contract is damaged"):
        Contract.from_metadata({"edgelora.contract.version": 1, key: value})


def test_a_version_is_shown_as_it_is() -> None:
    with pytest.raises(ModelFileError, match="has version '1'; this edgelora reads version 1"):
        Contract.from_metadata({"edgelora.contract.version": "1"})
