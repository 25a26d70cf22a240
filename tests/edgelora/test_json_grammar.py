"""JSON schemas as grammars: what can be kept is, what cannot is refused by name. Replies are tested in engine/."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgelora import gbnf
from edgelora.json_grammar import RULES, grammar_of, problems_of
from tests.edgelora.json_schemas import PERSON, SCHEMAS, breaks


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_supported_schema_is_a_grammar(name: str) -> None:
    text = json.dumps(SCHEMAS[name])
    assert problems_of(text) == ()
    assert gbnf.problems(grammar_of(text)) == ()


def test_every_shared_rule_is_well_formed() -> None:
    text = "".join(f"{name} ::= {rule}\n" for name, rule in {"root": " | ".join(RULES), **RULES}.items())
    assert gbnf.problems(text) == ()


@pytest.mark.parametrize("schema", [{}, {"type": "object"}, {"type": "object", "title": "anything"}])
def test_no_keywords_are_any_object(schema: Any) -> None:
    assert grammar_of(json.dumps(schema)).startswith("root ::= object\n")


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "string", "pattern": "^(?=a)b$"}, "pattern"),
        ({"type": "string", "format": "email"}, "email"),
        ({"type": "string", "contentEncoding": "base64"}, "contentEncoding"),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
        ({"type": "number", "minimum": 0.5}, "not whole"),
        ({"type": "number", "exclusiveMinimum": 0}, "exclusiveMinimum"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no whole number between"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "minItems": 3, "items": False}, "minItems 3"),
        ({"type": "array", "minItems": "3"}, "minItems"),
        ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "false is no schema"),
        ({"type": "strin"}, "strin"),
        ({"not": {}}, "not"),
        ({"allOf": [{}, {}]}, "allOf"),
        ({"anyOf": [{"type": "null"}], "minLength": 1}, "minLength beside anyOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"enum": ["a"], "type": "integer"}, "no value fits"),
        ({"$ref": "#/$defs/missing"}, "points to nothing"),
        ({"$ref": "https://example.com/schema"}, "points to nothing"),
        ({"$ref": "#"}, "begins with itself"),
        ({"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}]}}}, "begins with itself"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(schema: Any, named: str) -> None:
    found = problems_of(json.dumps(schema))
    assert any(named in problem for problem in found), found


def test_all_problems_are_told_with_their_places() -> None:
    schema = {"properties": {"a": {"not": {}}, "b": {"type": "array", "items": {"if": {}}}}}
    assert problems_of(json.dumps(schema)) == (
        "unsupported keyword not at #/properties/a",
        "unsupported keyword if at #/properties/b/items",
    )


def test_a_deep_schema_is_refused_and_not_a_crash() -> None:
    schema: Any = {}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    assert "deeper than" in problems_of(json.dumps(schema))[0]


def test_twin_the_validator_of_these_tests_sees_what_is_wrong() -> None:
    good = {"name": "Ada", "age": 36, "tags": ["red"]}
    assert breaks(good, PERSON) == ""
    wrong = [{"name": ""}, {"name": "x" * 9}, {"age": 121}, {"age": True}, {"tags": ["blue"]}, {"more": 1}]
    assert all(breaks({**good, **change}, PERSON) for change in wrong)
    assert breaks({"name": "Ada"}, PERSON)
    assert breaks({"kind": "triangle"}, SCHEMAS["shapes"])
    assert breaks({"ab": None, "a": True}, SCHEMAS["others"])
    assert breaks({"day": "2023-02-29", "id": "0" * 32, "more": True}, SCHEMAS["formats"])
