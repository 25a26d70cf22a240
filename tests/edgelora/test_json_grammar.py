"""JSON schemas as grammars: what can be kept is, what cannot is refused by name. Replies are tested in engine/."""

from __future__ import annotations

import ast
import json
import random
import re
import time
from datetime import date
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


WORDS = re.compile(r'("(?:[^"\\]|\\.)*")|(\[(?:[^\]\\]|\\.)*\])|(\{[\d,]+\})|([a-z][a-z0-9-]*)| ')


def pattern(schema: Any) -> re.Pattern[str]:
    """The grammar of a schema as a regular expression, which only grammars without recursion have."""
    assert problems_of(json.dumps(schema)) == ()
    rules = dict(line.split(" ::= ", 1) for line in grammar_of(json.dumps(schema)).strip().split("\n"))

    def of(rule: str) -> str:
        return WORDS.sub(part, rule)

    def part(match: re.Match[str]) -> str:
        literal, characters, times, name = match.groups()
        if literal:
            return f"(?:{re.escape(ast.literal_eval(literal))})"
        return characters or times or (f"(?:{of(rules[name])})" if name else "")

    return re.compile(of(rules["root"]))


BOUNDS = [(0, 0), (0, 9), (1, 10), (5, 250), (99, 100), (-7, -3), (-120, 45), (100, 1999), (-1, 0), (987, 6543)]


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_bounded_integers_are_those_between_the_bounds(low: int, high: int) -> None:
    fits = pattern({"type": "integer", "minimum": low, "maximum": high})
    numbers = range(low - 300, high + 300)
    assert [number for number in numbers if fits.fullmatch(str(number))] == list(range(low, high + 1))
    open_ended = pattern({"type": "integer", "exclusiveMinimum": low})
    assert [number for number in numbers if open_ended.fullmatch(str(number))] == list(range(low + 1, high + 300))
    assert not fits.fullmatch(f"0{high}")


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_bounded_numbers_are_those_between_the_bounds(low: int, high: int) -> None:
    fits = pattern({"type": "number", "minimum": low, "maximum": high})
    texts = [f"{number}{rest}" for number in range(low - 12, high + 12) for rest in ("", ".0", ".01", ".999")]
    texts.append("-0.5")
    accepted = [text for text in texts if fits.fullmatch(text)]
    assert all(low <= float(text) <= high for text in accepted)
    assert {float(text) for text in texts if low <= float(text) <= high} <= {float(text) for text in accepted}


def test_every_date_is_one_and_only_leap_days_are_left_out() -> None:
    fits = pattern({"type": "string", "format": "date"})
    days = [f"{year}-{month:02}-{day:02}" for year in (2023, 2024) for month in range(14) for day in range(33)]
    assert [day for day in days if not fits.fullmatch(f'"{day}"') and _is_date(day)] == ["2024-02-29"]
    assert [day for day in days if fits.fullmatch(f'"{day}"') and not _is_date(day)] == []


def _is_date(text: str) -> bool:
    try:
        return bool(date.fromisoformat(text))
    except ValueError:
        return False


@pytest.mark.parametrize(("least", "most"), [(0, 0), (0, 1), (0, 3), (1, 1), (2, 2), (2, 5), (3, None)])
@pytest.mark.parametrize("first", [[], [{"const": 1}], [{"const": 1}, {"const": 1}]])
def test_arrays_have_as_many_items_as_they_may(least: int, most: int | None, first: list[Any]) -> None:
    schema = {"type": "array", "prefixItems": first, "items": {"const": 1}, "minItems": least}
    fits = pattern(schema if most is None else {**schema, "maxItems": most})
    counts = [count for count in range(9) if fits.fullmatch(json.dumps([1] * count))]
    fewest = max(least, len(first) if most is None else min(len(first), most))
    assert counts == list(range(fewest, 9 if most is None else most + 1))


@pytest.mark.parametrize(("least", "most"), [(0, 0), (1, 1), (2, 7), (0, 1000), (999, 1001), (0, 2500), (1500, 3500)])
def test_strings_are_as_long_as_they_may_be(least: int, most: int) -> None:
    fits = pattern({"type": "string", "minLength": least, "maxLength": most})
    near = {0, 1, least - 1, least, least + 1, (least + most) // 2, 1000, 2000, most - 1, most, most + 1, most + 1000}
    assert all(bool(fits.fullmatch(json.dumps("é" * n))) == (least <= n <= most) for n in near if n >= 0)


def test_other_keys_are_none_of_the_named_ones() -> None:
    names = ["a", "ab", "abc", "b", "", 'q"', "é"]
    schema = {"properties": {name: {"type": "null"} for name in names}, "additionalProperties": {"type": "boolean"}}
    fits = pattern(schema)
    for name in names:
        assert fits.fullmatch(json.dumps({name: None}, ensure_ascii=False))
        assert not fits.fullmatch(json.dumps({name: True}, ensure_ascii=False))
    for other in ("c", "aa", "abd", "abcd", "bb", "q", "éa", " "):
        assert fits.fullmatch(json.dumps({other: True}, ensure_ascii=False))
        assert fits.fullmatch(json.dumps({"ab": None, other: True, "x": False}, ensure_ascii=False))
    assert not fits.fullmatch('{"\\u0061": true}')


def test_characters_that_json_has_to_escape_are_escaped() -> None:
    fits = pattern({"type": "string", "minLength": 1})
    assert all(fits.fullmatch(json.dumps(chr(code), ensure_ascii=False)) for code in range(0xD800) if code != 0x7F)
    assert not any(fits.fullmatch(f'"{chr(code)}"') for code in (*range(0x20), 0x22, 0x5C))
    assert not fits.fullmatch(r'"\ud800"')
    value = 'a"b\\c\n\u2028'
    assert pattern({"const": value}).fullmatch(json.dumps(value, ensure_ascii=False))


PATTERNS = [
    r"^[A-Z]{3}-\d+$",
    r"^(?:red|dark (?:red|blue))$",
    r"^\w+@[\w.-]+\.(com|org)$",
    r"^[^\s\"]*$",
    r"a.c",
    r"^a|b$",
    r"^\$[1-9][0-9]{0,2}(?:\.[0-9]{2})?$",
    r"^[\]\\^-]+$",
    r"\n",
    r"^\u00e9?\x41{2,}$",
    r"^[a-c-]+?$",
    r"^$",
    r"^\D\S\W$",
]


@pytest.mark.parametrize("expression", PATTERNS)
def test_strings_match_their_pattern_and_those_that_match_are_allowed(expression: str) -> None:
    fits = pattern({"type": "string", "pattern": expression})
    rng = random.Random(expression)
    alphabet = 'ABCabc019 -_.@$^]\\"\n\té€🙂redbluekorgm'
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(5))) for _ in range(4000)]
    texts += [
        "a\nc",
        "ABC-12",
        "red",
        "dark blue",
        "a@b.com",
        "a@b-c.org",
        "xabcx",
        "b",
        "$5.20",
        "$120",
        "éAA",
        "a-c",
        "\\]^-",
    ]
    standard = re.compile(re.sub(r"\$$", r"\\Z", expression), re.ASCII)  # what ECMA-262 means by $ and \W
    wanted = {text for text in texts if standard.search(text)}
    assert {text for text in texts if fits.fullmatch(json.dumps(text, ensure_ascii=False))} == wanted
    assert wanted
    assert len(wanted) < len(texts)


@pytest.mark.parametrize("schema", [{}, {"type": "object"}, {"type": "object", "title": "anything"}])
def test_no_keywords_are_any_object(schema: Any) -> None:
    assert grammar_of(json.dumps(schema)).startswith("root ::= object\n")


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "string", "pattern": "^(?=a)b$"}, "look-around"),
        ({"type": "string", "pattern": r"(a)\1"}, r"\1"),
        ({"type": "string", "pattern": r"\bword\b"}, r"\b"),
        ({"type": "string", "pattern": r"\p{L}"}, r"\p"),
        ({"type": "string", "pattern": "(^a$)"}, "^ in this place"),
        ({"type": "string", "pattern": "(a"}, "( without )"),
        ({"type": "string", "pattern": "a)"}, ") without ("),
        ({"type": "string", "pattern": "[z-a]"}, "a range that is none"),
        ({"type": "string", "pattern": "[a"}, "too early"),
        ({"type": "string", "pattern": "(a*)*"}, "may be empty"),
        ({"type": "string", "pattern": "^\\x01$"}, "no short form"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "maxLength beside pattern"),
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


def doubling(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "required": ["a", "b"], "additionalProperties": schema}  # once for each name
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        doubling(40),
        {"oneOf": [{"type": "object", "properties": {"k": {"const": n}}, "required": ["k"]} for n in range(1500)]},
        {"anyOf": [{"enum": [n]} for n in range(30_000)]},
    ],
    ids=["doubling", "compared", "many"],
)
def test_schemas_that_would_take_for_ever_are_refused_soon(schema: dict[str, Any]) -> None:
    began = time.monotonic()
    assert any("takes more than" in problem for problem in problems_of(json.dumps(schema)))
    assert time.monotonic() - began < 5


def test_a_type_that_is_named_twice_counts_once() -> None:
    once, twice = (
        {"type": types, "properties": {"a": {"type": "null"}}} for types in (["object"], ["object", "object"])
    )
    assert grammar_of(json.dumps(once)) == grammar_of(json.dumps(twice))


def test_an_index_of_many_digits_points_to_nothing() -> None:
    assert problems_of(json.dumps({"$ref": "#/prefixItems/" + "9" * 5000, "prefixItems": [{}]}))
