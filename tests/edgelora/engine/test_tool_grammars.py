"""Grammars of replies that may call: strict tools in free text, and calls or JSON; schemas of calls without JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelora.engine.model import Model
from edgelora.errors import SettingsError
from edgelora.tools import Choice, Parser, checked_tools, forced, parse
from edgelora.tools.families import FAMILIES
from edgelora.tools.forcing import calls_or_json, strict_calls
from tests.edgelora.engine.test_tool_prompts import BY_NAME, NATURAL, taken, written
from tests.edgelora.json_schemas import breaks
from tests.edgelora.test_tools import NOW

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Bergen"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TRIP = {"type": "function", "function": {"name": "trip", "parameters": CITY, "strict": True}}
FREE = {"type": "function", "function": {"name": "trip", "parameters": CITY}}
STRICT, LOOSE = checked_tools([TRIP, NOW]), checked_tools([FREE, NOW])
TRIPS = {  # a call of `trip`, with a place for the city
    "hermes": '<tool_call>\n{"name": "trip", "arguments": {"city": "CITY"}}\n</tool_call>',
    "qwen3-coder": "<tool_call>\n<function=trip>\n<parameter=city>\nCITY\n</parameter>\n</function>\n</tool_call>",
    "seed": "<seed:tool_call>\n<function=trip>\n<parameter=city>CITY</parameter>\n</function>\n</seed:tool_call>",
    "glm": "<tool_call>trip\n<arg_key>city</arg_key>\n<arg_value>CITY</arg_value>\n</tool_call>",
    "minimax-m2": '<minimax:tool_call>\n<invoke name="trip">\n<parameter name="city">CITY</parameter>\n</invoke>\n'
    "</minimax:tool_call>",
    "functionary-3.1": '<function=trip>{"city": "CITY"}</function>',
    "mistral": '[TOOL_CALLS] [{"name": "trip", "arguments": {"city": "CITY"}}]',
    "mistral-args": '[TOOL_CALLS]trip[ARGS]{"city": "CITY"}',
    "granite-3": '<|tool_call|>[{"name": "trip", "arguments": {"city": "CITY"}}]',
    "apriel": '<tool_calls>[{"name": "trip", "arguments": {"city": "CITY"}}]</tool_calls>',
    "nemotron-2": '<TOOLCALL>[{"name": "trip", "arguments": {"city": "CITY"}}]</TOOLCALL>',
    "gigachat": '<|function_call|>{"name": "trip", "arguments": {"city": "CITY"}}',
    "llama-3": '{"name": "trip", "parameters": {"city": "CITY"}}',
    "command-r7b": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "trip", "parameters": {"city": "CITY"}}'
    "\n]<|END_ACTION|>",
    "deepseek-r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>trip\n```json\n"
    '{"city": "CITY"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "deepseek-v3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>trip<｜tool▁sep｜>{"city": "CITY"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>",
    "kimi-k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.trip:0<|tool_call_argument_begin|>"
    '{"city": "CITY"}<|tool_call_end|><|tool_calls_section_end|>',
    "lfm2": '<|tool_call_start|>[trip(city="CITY")]<|tool_call_end|>',
    "gemma-4": '<|tool_call>call:trip{city:<|"|>CITY<|"|>}<tool_call|>',
    "gpt-oss": '<|channel|>commentary to=functions.trip <|constrain|>json<|message|>{"city": "CITY"}',
}
TEXTS = ("", "Well.", "A < b <tool", '[1] "x"', "Two\n\nlines 日本 🙂")
FINAL = "<|channel|>final<|message|>"


@pytest.fixture(scope="module")
def model(base: Path) -> Iterator[Model]:
    model = Model(base)
    yield model
    model.close()


def test_every_family_has_a_call() -> None:
    assert list(TRIPS) == list(NATURAL) == [family.name for family in FAMILIES]


@pytest.mark.parametrize("name", TRIPS)
def test_a_strict_tools_arguments_fit_in_a_reply_that_is_free(model: Model, name: str) -> None:
    family, call = BY_NAME[name], TRIPS[name]
    grammar = strict_calls(STRICT, family)
    for text in TEXTS:
        assert taken(model, grammar, (FINAL if name == "gpt-oss" else "") + text), text
    before = {"llama-3": "", "gpt-oss": "<|channel|>analysis<|message|>So.<|end|><|start|>assistant"}.get(name, "So: ")
    fitting = before + call.replace("CITY", "Oslo")
    assert taken(model, grammar, fitting)
    assert [one.name for one in parse(fitting, family, STRICT).calls] == ["trip"]
    for wrong in (call, call.replace("CITY", "Oslo").replace("city", "town"), call.replace("trip", "strip")):
        assert not taken(model, grammar, before + wrong)
    assert taken(model, strict_calls(LOOSE, family), before + call)  # twin: nothing says that it has to fit


@pytest.mark.parametrize("name", TRIPS)
def test_a_tool_that_is_not_strict_may_be_called_with_anything(model: Model, name: str) -> None:
    mixed = checked_tools([FREE, {**NOW, "function": {**NOW["function"], "strict": True}}])
    before = {"llama-3": "", "gpt-oss": ""}.get(name, "So: ")
    assert taken(model, strict_calls(mixed, BY_NAME[name]), before + TRIPS[name].replace("city", "town"))


def test_a_strict_reply_that_begins_with_an_object_is_a_call_where_calls_are_objects(model: Model) -> None:
    grammar = strict_calls(STRICT, BY_NAME["llama-3"])
    for text in ('{"name": "trip", "parameters": {"city": "Rome"}}', '{"a": 1}', '  {"a": 1}', "\n\u2003{"):
        assert not taken(model, grammar, text)
    for text in ('Say {"a": 1}', "\n<b>", '<|python_tag|>{"name": "now", "parameters": {}}'):
        assert taken(model, grammar, text)


@pytest.mark.parametrize("parallel", [True, False])
def test_several_strict_calls_only_where_they_are_wanted(model: Model, parallel: bool) -> None:
    for name in ("hermes", "gemma-4", "qwen3-coder"):
        one = TRIPS[name].replace("CITY", "Oslo")
        grammar = strict_calls(STRICT, BY_NAME[name], parallel=parallel)
        assert taken(model, grammar, f"{one}\n{one} So.") == parallel


ANSWER: dict[str, Any] = {"type": "object", "properties": {"degrees": {"type": "integer"}}, "required": ["degrees"]}
TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


@pytest.mark.parametrize("name", [name for name in TRIPS if name != "llama-3"])
def test_a_reply_is_a_call_or_json_that_fits(model: Model, name: str) -> None:
    family = BY_NAME[name]
    grammar = calls_or_json(STRICT, family, ANSWER)
    answer = family.before_json + '{"degrees": 4}'
    assert taken(model, grammar, answer)
    assert taken(model, grammar, TRIPS[name].replace("CITY", "Oslo"))
    for wrong in ("", "Well.", family.before_json + '{"degrees": "4"}', TRIPS[name], f"So: {TRIPS[name]}"):
        assert not taken(model, grammar, wrong), wrong
    parser = Parser(family, STRICT, either=True)
    assert parser.feed(answer) + parser.end() == '{"degrees": 4}'


def test_a_call_inside_of_the_json_is_text(model: Model) -> None:
    for name in ("mistral", "hermes", "gemma-4"):
        inner = json.dumps({"text": TRIPS[name].replace("CITY", "Oslo").replace('"', "'")})
        assert taken(model, calls_or_json(STRICT, BY_NAME[name], TEXT), inner)
        parser = Parser(BY_NAME[name], STRICT, either=True)
        assert (parser.feed(inner) + parser.end(), parser.calls) == (inner, [])


SCHEMAS: dict[str, Any] = {
    "lengths": {
        "type": "object",
        "properties": {
            "a": {"type": "string", "minLength": 2, "maxLength": 4},
            "b": {"type": "string", "format": "date"},
            "c": True,
        },
        "required": ["a", "b"],
    },
    "enum": {
        "type": "object",
        "properties": {"a": {"enum": ["x y", 1.5, None, True, ["p", {"q": 2}]]}, "b": {"const": "it's {b}: <c>"}},
        "required": ["a", "b"],
    },
    "nested": {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/one"}, "maxItems": 2}},
        "required": ["a"],
        "$defs": {"one": {"type": "object", "properties": {"k-1": {"type": "boolean"}}, "required": ["k-1"]}},
    },
    "others": {
        "type": "object",
        "properties": {"ab": {"type": "null"}},
        "additionalProperties": {"type": "integer", "minimum": -3, "maximum": 12},
    },
    "either": {
        "type": "object",
        "properties": {"a": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]}},
        "required": ["a"],
    },
}


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("name", ["gemma-4", "lfm2"])
def test_arguments_that_are_no_json_fit_whatever_the_logits(model: Model, name: str, schema: str) -> None:
    tools = checked_tools([{"type": "function", "function": {"name": "look", "parameters": SCHEMAS[schema]}}])
    family = BY_NAME[name]
    must = forced(Choice("named", "look"), tools, family)
    replies = [reply for seed in range(6) if (reply := written(model, must.grammar, seed, 150))]
    assert replies
    for reply in replies:
        (call,) = parse(reply, family, tools, must.opening).calls
        assert breaks(json.loads(call.arguments), SCHEMAS[schema]) == "", reply


def test_texts_and_names_between_tokens_end_where_they_seem_to(model: Model) -> None:
    properties = {"a": {"type": "string", "maxLength": 20}, "n": {"type": "null"}, "n b": {"type": "null"}}
    parameters = {"type": "object", "properties": properties, "additionalProperties": {"type": "integer"}}
    tools = checked_tools([{"type": "function", "function": {"name": "look", "parameters": parameters}}])
    grammar = forced(Choice("named", "look"), tools, BY_NAME["gemma-4"]).grammar
    for text in ('{a:<|"|>x y<|"|>}', "{n:null,n b:null,no:3}"):
        assert taken(model, grammar, "look" + text)
    for text in ('{a:<|"|>x<|"|>y<|"|>}', "{n :3}", "{n:3}", '{"n":3}'):
        assert not taken(model, grammar, "look" + text)


def test_an_argument_that_may_be_anything(model: Model) -> None:
    parameters = {"type": "object", "properties": {"x": {}}}
    tools = checked_tools([{"type": "function", "function": {"name": "look", "parameters": parameters}}])
    grammar = forced(Choice("required"), tools, BY_NAME["lfm2"]).grammar
    assert all(taken(model, grammar, f"look({given})]") for given in ("", "x=3", 'x={"y": null}'))
    assert not taken(model, grammar, "look(y=3)]")


def test_what_bare_names_cannot_hold_is_refused() -> None:
    refused = {"a:b": {"type": "null"}, "c": {"type": "string", "pattern": "^x$"}, "d": {"const": '<|"|>'}}
    for name, schema in refused.items():
        parameters = {"type": "object", "properties": {name: schema}}
        tools = checked_tools([{"type": "function", "function": {"name": "look", "parameters": parameters}}])
        with pytest.raises(SettingsError, match="tool look: parameters, "):
            forced(Choice("required"), tools, BY_NAME["gemma-4"])
