"""Calls that are not in JSON, replies on channels, and replies that are calls or JSON."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from edgelora.errors import SettingsError
from edgelora.messages import prepared
from edgelora.tools import Parsed, Parser, checked_tools, parse, tool_use
from edgelora.tools.calls import Family
from edgelora.tools.families import FAMILIES
from edgelora.tools.writing import written_message
from tests.edgelora.test_tools import (
    CALL,
    HERMES,
    LLAMA,
    NOW,
    QUESTION,
    TOOLS,
    WEATHER,
    calling,
    needs_templates,
    pairs,
    template,
)

BY_NAME = {family.name: family for family in FAMILIES}
LFM2, GEMMA, HARMONY = (BY_NAME[name] for name in ("lfm2", "gemma-4", "gpt-oss"))


def cut_anywhere(text: str, family: Family, *, either: bool = False) -> Parsed:
    """What a reply says, which is the same in whatever pieces it comes."""
    found = set()
    for cuts in ([], *([cut] for cut in range(len(text) + 1)), range(1, len(text))):
        parser = Parser(family, TOOLS, either=either)
        content = "".join(parser.feed(text[a:b]) for a, b in pairwise([0, *cuts, len(text)]))
        found.add((content + parser.end(), tuple(parser.calls)))
    ((content, calls),) = found
    return Parsed(content, calls)


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ("", {}),
        ("city='Oslo'", {"city": "Oslo"}),
        ('city = "Oslo" , days=3', {"city": "Oslo", "days": 3}),
        ("exact=True, note=None", {"exact": True, "note": None}),
        ("exact=false, note=null", {"exact": False, "note": None}),
        (
            "units={'t': ['°C', {'deep': [1, -2.5e3, None, True]}]}",
            {"units": {"t": ["°C", {"deep": [1, -2500.0, None, True]}]}},
        ),
        ('units={"t": true, "u": []}', {"units": {"t": True, "u": []}}),
        (r"city='it\'s \"x\"\n\\ \u65e5\ud83d\ude42\x41'", {"city": 'it\'s "x"\n\\ 日🙂A'}),
        ("city='two\nlines \\d'", {"city": "two\nlines \\d"}),
        ("city=')]<|tool_call_end|>'", {"city": ")]<|tool_call_end|>"}),
        ("city=Oslo", None),
        ("city='Oslo", None),
        ("city='Oslo' days=3", None),
        ("city='a', city='b'", None),
        ("'Oslo'", None),
        ("days=1e999", None),
        ("days=" + "[" * 100 + "]" * 100, None),
    ],
)
def test_arguments_as_python_writes_them(arguments: str, read: Any) -> None:
    text = f"So: <|tool_call_start|>[weather({arguments})]<|tool_call_end|>"
    found = cut_anywhere(text, LFM2)
    if read is None:
        assert found == Parsed(text, ())
    else:
        assert (found.content, pairs(found.calls)) == ("So:", [("weather", read)])


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ("", {}),
        ('city:<|"|>a "b" \\n {c}: <|"|>', {"city": 'a "b" \\n {c}: '}),
        ("days:3,exact:true,note:null", {"days": 3, "exact": True, "note": None}),
        ("days:-7, note:None", {"days": -7, "note": None}),
        ('units:{t:[<|"|>°C<|"|>,{deep:[1,2.5]}]}', {"units": {"t": ["°C", {"deep": [1, 2.5]}]}}),
        ('units:{<|"|>a b<|"|>:{}}', {"units": {"a b": {}}}),
        ('city:"Oslo"', None),
        ('city:<|"|>Oslo', None),
        ("days:3,days:4", None),
        ("days", None),
    ],
)
def test_arguments_between_tokens(arguments: str, read: Any) -> None:
    text = f"So: <|tool_call>call:weather{{{arguments}}}<tool_call|>"
    found = cut_anywhere(text, GEMMA)
    if read is None:
        assert found == Parsed(text, ())
    else:
        assert (found.content, pairs(found.calls)) == ("So:", [("weather", read)])


def test_several_calls_of_one_reply() -> None:
    several = [("weather", {"city": "Oslo"}), ("now", {})]
    for name, text in {
        "lfm2": '<|tool_call_start|>[weather(city="Oslo"), now()]<|tool_call_end|>',
        "gemma-4": '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|><|tool_call>call:now{}<tool_call|>',
        "kimi-k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Oslo"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        "deepseek-v3.1": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo"}'
        "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "deepseek-r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Oslo"}```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "command-r7b": '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Oslo"}},'
        '{"tool_name": "now", "parameters": {}}]<|END_ACTION|>',
    }.items():
        found = cut_anywhere(text, BY_NAME[name])
        assert (name, found.content, pairs(found.calls)) == (name, "", several)
        other = text.replace("now", "then")
        assert cut_anywhere(other, BY_NAME[name]).content.endswith(
            other if name != "gemma-4" else "call:then{}<tool_call|>"
        )


THOUGHT = "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant"
ARGUMENTS = '{"city": "Oslo"}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{THOUGHT}<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}", "", 1),
        (f"{THOUGHT}<|channel|>analysis to=functions.weather<|message|>{ARGUMENTS}", "", 1),
        (f"{THOUGHT} to=functions.weather<|channel|>commentary json<|message|>{ARGUMENTS}", "", 1),
        (f" to=functions.weather<|channel|>commentary json<|message|>{ARGUMENTS}", "", 1),
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
            f"to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}",
            "I look.",
            1,
        ),
        (f"<|channel|>commentary to=assistant{THOUGHT}<|channel|>final<|message|>Yes.", "Yes.", 0),
        (f"{THOUGHT}<|channel|>final<|message|>It is <|cold|> there.", "It is <|cold|> there.", 0),
        ("<|channel|>final<|message|>Yes.<|end|>", "Yes.", 0),
        ("A text alone.", "A text alone.", 0),
        ("  to market", "  to market", 0),
        ("<|channel|>analysis<|message|>They", "", 0),
        ("<|channel|>anal", "<|channel|>anal", 0),
        ("", "", 0),
    ],
)
def test_replies_on_channels(text: str, content: str, calls: int) -> None:
    found = cut_anywhere(text, HARMONY)
    assert (found.content, pairs(found.calls)) == (content, [("weather", {"city": "Oslo"})] * calls)


@pytest.mark.parametrize("name", ["weater", "python"])
def test_a_call_of_an_unknown_tool_on_a_channel_is_text(name: str) -> None:
    text = f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{ARGUMENTS}"
    assert cut_anywhere(f"<|channel|>analysis<|message|>They ask.<|end|>{text}", HARMONY) == Parsed(text, ())


def test_text_on_the_final_channel_comes_as_it_is_written() -> None:
    parser = Parser(HARMONY, TOOLS)
    assert [parser.feed(piece) for piece in ("<|channel|>final", "<|message|>It", " is", " so.<", "b>")] == [
        *("", "It", " is", " so.", "<b>")
    ]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", 1),
        (f"\n{CALL}\n{CALL}", "", 2),
        (json.dumps({"x": CALL}), json.dumps({"x": CALL}), 0),
        (f'["{CALL}', f'["{CALL}', 0),
        ("", "", 0),
        ("<tool_call>{}", "<tool_call>{}", 0),
    ],
)
def test_a_reply_that_is_calls_or_json(text: str, content: str, calls: int) -> None:
    found = cut_anywhere(text, HERMES, either=True)
    assert (found.content, len(found.calls)) == (content, calls)


def test_twin_a_call_in_a_text_is_read_where_the_reply_is_free() -> None:
    assert len(parse(json.dumps({"x": CALL}).replace('\\"', '"').replace("\\n", "\n"), HERMES, TOOLS).calls) == 1


def test_strict_is_true_or_false() -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert [tool.strict for tool in checked_tools([strict, NOW]).values()] == [True, False]
    assert "strict" not in checked_tools([strict])["weather"].definition["function"]
    wrong = {"type": "function", "function": {**WEATHER["function"], "strict": "yes"}}
    with pytest.raises(SettingsError, match="strict is 'yes', expected true or false"):
        checked_tools([wrong])


MAIL = {"type": "object", "properties": {"to": {"type": "string", "format": "email"}}}


@needs_templates
@pytest.mark.parametrize("name", ["Qwen-Qwen3-0.6B", "google-gemma-4-31B-it", "openai-gpt-oss-120b", "LFM2-8B-A1B"])
def test_a_strict_schema_that_cannot_be_kept_is_refused(name: str) -> None:
    mail: dict[str, Any] = {"type": "function", "function": {"name": "mail", "parameters": MAIL}}
    free = tool_use([mail], "auto", template(name))
    assert free
    assert free.grammar is None
    mail["function"]["strict"] = True
    with pytest.raises(SettingsError, match=r'strict: tool mail: parameters, unsupported format "email"'):
        tool_use([mail], "auto", template(name))


@needs_templates
@pytest.mark.parametrize("name", ["openai-gpt-oss-120b", "GigaChat3.1-10B-A1.8B", "Qwen-Qwen3-0.6B"])
def test_a_template_that_would_lose_a_call_is_given_one_a_message(name: str) -> None:
    source, keeps = template(name), name.startswith("Qwen")
    one, two = (prepared([QUESTION, calling(*each)])[1] for each in (({"city": "Oslo"},), ({"city": "Oslo"}, {})))
    assert written_message(source, one)["tool_calls"]
    use = tool_use([WEATHER], "auto", source)
    assert use
    assert use.parallel == keeps
    in_content = tool_use([WEATHER], "auto", template("LFM2-8B-A1B"))  # whose calls the template does not write
    assert in_content
    assert in_content.parallel
    if keeps:
        assert len(written_message(source, two)["tool_calls"]) == 2
    else:
        with pytest.raises(SettingsError, match="a message has 2 calls, and this chat template writes the first"):
            written_message(source, two)


@needs_templates
def test_a_schema_for_the_reply_beside_calls_that_are_json_is_refused() -> None:
    llama, schema = template("meta-llama-Llama-3.1-8B-Instruct"), {"type": "object"}
    with pytest.raises(SettingsError, match="this chat template's calls are JSON themselves"):
        tool_use([WEATHER], "auto", llama, schema=schema)
    must = tool_use([WEATHER], "required", llama, schema=schema)
    assert must
    assert must.family is LLAMA
