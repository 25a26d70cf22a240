"""Tools of a conversation: how templates write calls, replies read back, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest

from edgelora.errors import SettingsError
from edgelora.messages import Message, check_messages, check_tool_turns, prepared
from edgelora.template import BUILTIN, ChatTemplate
from edgelora.tools import (
    Choice,
    Parsed,
    Parser,
    ToolCall,
    checked_choice,
    checked_tools,
    family_of,
    forced,
    new_call_id,
    parse,
    required_family,
    tool_use,
)
from edgelora.tools.families import FAMILIES
from tests.conftest import ROOT

FOLDER = ROOT / "build" / "reference" / "models" / "templates"
TEMPLATES = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
BY_NAME = {family.name: family for family in FAMILIES}
HERMES, CODER, LLAMA, MISTRAL = (BY_NAME[name] for name in ("hermes", "qwen3-coder", "llama-3", "mistral"))
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where."},
                "days": {"type": "integer", "description": "How many."},
                "units": {"type": "object", "description": "In which.", "properties": {}},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "Why."},
                "exact": {"type": "boolean", "description": "How."},
            },
            "required": ["city"],
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now", "description": "The time."}}
TOOLS = checked_tools([WEATHER, NOW])
QUESTION: Message = {"role": "user", "content": "A question?"}
ARGUMENTS: Sequence[Mapping[str, Any]] = (
    {"city": "Tromsø 日本 🙂", "days": 3, "units": {"t": ["°C", {"deep": [1, 2.5, None, True]}]}},
    {"city": 'a "quoted" \\ word\nand {braces] </tool_ <tag>', "exact": False},
    {"city": "True", "note": None},
)

# What real templates write is read by these; the others are refused.
READ_BY = {
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen-QwQ-32B": "hermes",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Bielik-11B-v3.0-Instruct": "hermes",
    "MiMo-VL": "hermes",
    "Reka-Edge": "hermes",
    "ibm-granite-granite-4.0": "hermes",
    "ibm-granite-granite-4.1": "hermes",
    "ibm-granite-granite-3.3-2B-Instruct": "granite-3",
    "Qwen3-Coder": "qwen3-coder",
    "Qwen3.5-4B": "qwen3-coder",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen3-coder",
    "StepFun3.5-Flash": "qwen3-coder",
    "ByteDance-Seed-OSS": "seed",
    "GLM-4.6": "glm",
    "GLM-4.7-Flash": "glm",
    "inclusionai-ling-3.0-flash": "glm",
    "Spark2.5": "glm",
    "poolside-Laguna-S-2.1": "glm",
    "poolside-Laguna-XS-2.1": "glm",
    "poolside-Laguna-XS.2": "glm",
    "MiniMax-M2": "minimax-m2",
    "meetkai-functionary-medium-v3.1": "functionary-3.1",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral-args",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral-args",
    "unsloth-mistral-Devstral-Small-2507": "mistral-args",
    "Apriel-1.6-15b-Thinker-fixed": "apriel",
    "unsloth-Apriel-1.5": "apriel",
    "NVIDIA-Nemotron-Nano-v2": "nemotron-2",
    "GigaChat3.1-10B-A1.8B": "gigachat",
    "meta-llama-Llama-3.1-8B-Instruct": "llama-3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama-3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama-3",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "command-r7b",
    "Cohere2MoE": "command-r7b",
    "llama-cpp-deepseek-r1": "deepseek-r1",
    "moonshotai-Kimi-K2": "kimi-k2",
    "LFM2-8B-A1B": "lfm2",
    "LFM2.5-Instruct": "lfm2",
    "LFM2.5-8B-A1B": "lfm2",
    "google-gemma-4-31B-it": "gemma-4",
    "openai-gpt-oss-120b": "gpt-oss",
}
WITHOUT_TOOLS = ("google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct", "deepseek-ai-DeepSeek-V3.1")
SHOWN = {"deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1"}
"""Those that write calls, and leave the tools to the system's message: read where something shows them."""
needs_templates = pytest.mark.skipif(
    not TEMPLATES, reason="llama.cpp's source, which brings templates, is not in build/reference"
)


def template(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name].read_text(encoding="utf-8"))


def calling(*arguments: Mapping[str, Any], content: str | None = None) -> dict[str, Any]:
    """An assistant's message as OpenAI has it."""
    calls = [
        {
            "id": f"call0000{index}",
            "type": "function",
            "function": {"name": "weather", "arguments": json.dumps(each, ensure_ascii=False)},
        }
        for index, each in enumerate(arguments, start=1)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


ANSWER: dict[str, Any] = {"role": "tool", "tool_call_id": "call00001", "content": "4 degrees"}


def rendered(source: ChatTemplate, messages: Sequence[Any], *, prompt: bool = False) -> str:
    tools = [tool.definition for tool in TOOLS.values()]
    return source.render(
        prepared(messages), add_generation_prompt=prompt, tools=tools, bos_token="<s>", eos_token="</s>"
    )


def pairs(calls: Sequence[ToolCall]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


def streamed(text: str, family: Any, *cuts: int, opening: str = "") -> tuple[str, Parsed]:
    """What a parser gives before the end, and in all, for a text cut at these places."""
    parser = Parser(family, TOOLS, opening)
    places = [0, *cuts, len(text)]
    early = "".join(parser.feed(text[a:b]) for a, b in pairwise(places))
    return early, Parsed(early + parser.end(), tuple(parser.calls))


# ---- Families: real templates.


@needs_templates
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_family_of_a_released_template(name: str) -> None:
    found = family_of(template(name))
    assert (found.name if found else None) == READ_BY.get(name)


@needs_templates
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=["nested", "quoted", "typed"])
@pytest.mark.parametrize("name", READ_BY)
def test_calls_that_a_released_template_writes_are_read_back(name: str, arguments: Mapping[str, Any]) -> None:
    source = template(name)
    family = required_family(source)
    if family.in_content:
        pytest.skip("it writes no calls itself")
    if name == "ByteDance-Seed-OSS":  # it writes objects as Python does
        arguments = {key: value for key, value in arguments.items() if key != "units"}
    several = () if family.name in ("llama-3", "gigachat", "gpt-oss") else ({"city": "second"},)
    text = rendered(source, [QUESTION, calling(arguments, *several)])
    turn = text[text.rfind("A question?") + len("A question?") :]
    if family is LLAMA:  # a call is the reply as a whole
        turn = turn.rpartition("<|end_header_id|>")[2].removesuffix("<|eot_id|>")
    assert pairs(parse(turn, family, TOOLS).calls) == [("weather", dict(each)) for each in (arguments, *several)]


@needs_templates
@pytest.mark.parametrize("name", SHOWN)
def test_calls_of_a_template_that_leaves_tools_to_others(name: str) -> None:
    source = ChatTemplate("{% if tools %}{{ tools | tojson }}{% endif %}" + template(name).source)
    assert required_family(source).name == SHOWN[name]
    text = rendered(source, [QUESTION, calling(ARGUMENTS[0], {"city": "second"}, content="I look."), ANSWER])
    found = parse(text.partition("A question?")[2], required_family(source), TOOLS)
    assert pairs(found.calls) == [("weather", dict(ARGUMENTS[0])), ("weather", {"city": "second"})]


@needs_templates
def test_a_template_that_gives_answers_a_turn_of_their_own_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"without <\|tool_response>response:, which gemma-4 models"):
        required_family(template("google-gemma-4-31B-it-interleaved"))


@needs_templates
@pytest.mark.parametrize("name", READ_BY)
def test_a_whole_conversation_with_tools_is_accepted(name: str) -> None:
    source = template(name)
    text = rendered(source, [QUESTION, calling({"city": "Oslo"}), ANSWER], prompt=True)
    assert "4 degrees" in text
    assert "The weather of a place." in text
    assert source.shows_tools


@pytest.mark.train
@needs_templates
@pytest.mark.parametrize("name", sorted(READ_BY.keys() - {"llama-cpp-deepseek-r1"}))  # transformers fails on that one
def test_same_text_as_transformers(name: str) -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    talk = prepared([QUESTION, calling(*ARGUMENTS[:1], content="I look."), ANSWER])
    for conversation in (talk, talk[:1]):
        (theirs,), _ = render(
            [conversation],
            tools=[WEATHER, checked_tools([NOW])["now"].definition],
            chat_template=TEMPLATES[name].read_text(encoding="utf-8"),
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
        )
        assert rendered(template(name), conversation, prompt=True) == theirs


@needs_templates
@pytest.mark.parametrize("name", WITHOUT_TOOLS)
def test_a_template_that_does_not_show_tools_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="same text with and without"):
        required_family(template(name))
    with pytest.raises(SettingsError, match="same text with and without"):
        tool_use([WEATHER], "auto", template(name))
    assert tool_use([WEATHER], "none", template(name)) is None
    assert not template(name).shows_tools


@pytest.mark.parametrize("name", BUILTIN)
def test_the_own_templates_do_not_show_tools(name: str) -> None:
    assert family_of(ChatTemplate(BUILTIN[name])) is None


HERMES_TEMPLATE = """{% if tools %}Tools: {{ tools | tojson }}
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_the_family_is_found_from_what_is_written() -> None:
    assert family_of(ChatTemplate(HERMES_TEMPLATE)) == HERMES
    mistral = HERMES_TEMPLATE.replace("<tool_call>\n", "[TOOL_CALLS] [").replace("\n</tool_call>", "]")
    assert family_of(ChatTemplate(mistral)) == MISTRAL
    unknown = HERMES_TEMPLATE.replace("tool_call>", "invented>")
    with pytest.raises(SettingsError, match="not known here: <invented>"):
        required_family(ChatTemplate(unknown))


def test_a_template_that_tells_how_to_call_and_writes_no_calls() -> None:
    told = HERMES_TEMPLATE.partition("{% for call")[0].replace("Tools:", "Answer with <tool_call>:")
    source = told + "<|im_end|>\n{% endfor %}"
    found = family_of(ChatTemplate(source))
    assert found
    assert (found.name, found.in_content) == ("hermes", True)
    lfm2 = family_of(ChatTemplate(source.replace("Answer with <tool_call>: ", "List of tools: ")))
    assert lfm2
    opening, text, closing = lfm2.written([ToolCall("now", "{}"), ToolCall("weather", json.dumps(ARGUMENTS[0]))])
    assert lfm2.in_content
    assert pairs(parse(opening + text + closing, lfm2, TOOLS).calls) == [("now", {}), ("weather", dict(ARGUMENTS[0]))]


# ---- Replies.

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OSLO = ("weather", {"city": "Oslo"})
WRITTEN: Mapping[str, tuple[str, str]] = {  # text before, and the call
    "hermes": ("I look.", CALL),
    "qwen3-coder": (
        "I look.",
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
    ),
    "seed": (
        "I look.",
        "<seed:tool_call><function=weather><parameter=city>Oslo</parameter></function></seed:tool_call>",
    ),
    "glm": (
        "I look.",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>",
    ),
    "minimax-m2": (
        "I look.",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Oslo</parameter>\n</invoke>\n'
        "</minimax:tool_call>",
    ),
    "functionary-3.1": ("I look.", '<function=weather>{"city": "Oslo"}</function>'),
    "mistral": ("I look.", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]'),
    "mistral-args": ("I look.", '[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Oslo"}'),
    "granite-3": ("I look.", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]'),
    "apriel": ("I look.", '<tool_calls>[{"name": "weather", "arguments": {"city": "Oslo"}}]</tool_calls>'),
    "nemotron-2": ("I look.", '<TOOLCALL>[{"name": "weather", "arguments": {"city": "Oslo"}}]</TOOLCALL>'),
    "gigachat": ("I look.", '<|function_call|>{"name": "weather", "arguments": {"city": "Oslo"}}'),
    "llama-3": ("", '{"name": "weather", "parameters": {"city": "Oslo"}}'),
    "command-r7b": (
        "I look.",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", "parameters": {"city": "Oslo"}}\n]'
        "<|END_ACTION|>",
    ),
    "deepseek-r1": (
        "I look.",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        '```json\n{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    "deepseek-v3.1": (
        "I look.",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Oslo"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    "kimi-k2": (
        "I look.",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    "lfm2": ("I look.", "<|tool_call_start|>[weather(city='Oslo')]<|tool_call_end|>"),
    "gemma-4": ("I look.", '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'),
    "gpt-oss": ("", '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}'),
}


def test_every_family_has_an_example() -> None:
    assert list(WRITTEN) == list(BY_NAME)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_reply_cut_anywhere_says_the_same(name: str) -> None:
    before, call = WRITTEN[name]
    family, text = BY_NAME[name], f"{before}\n\n{call}"
    whole = parse(text, family, TOOLS)
    assert (whole.content, pairs(whole.calls)) == (before, [OSLO])
    for cut in range(len(text) + 1):
        early, found = streamed(text, family, cut)
        assert found == whole
        assert early == before  # nothing of a call, and nothing late
    assert streamed(text, family, *range(1, len(text)))[1] == whole


@pytest.mark.parametrize("name", WRITTEN)
def test_a_call_that_is_cut_off_is_text(name: str) -> None:
    before, call = WRITTEN[name]
    for length in range(1, len(call)):
        found = parse(f"{before} {call[:length]}", BY_NAME[name], TOOLS)
        assert found.calls or found.content == f"{before} {call[:length]}"
        if found.calls:  # only what closes it is missing
            assert pairs(found.calls) == [OSLO]


@pytest.mark.parametrize("name", WRITTEN)
def test_an_unknown_tool_is_text(name: str) -> None:
    before, call = WRITTEN[name]
    text = f"{before}\n{call.replace('weather', 'wether')} "
    for cut in range(len(text)):
        assert streamed(text, BY_NAME[name], cut)[1] == Parsed(text, ())


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"{CALL}\n{CALL}", "", [OSLO, OSLO]),
        (
            f"One: {CALL} two: {CALL.replace('Oslo', '日本 🙂')}\n",
            "One: two:",
            [OSLO, ("weather", {"city": "日本 🙂"})],
        ),
        ('<tool_call>{"name":"now","arguments":{}}</tool_call>', "", [("now", {})]),
        ('<tool_call> \n{ "arguments" : { } ,\n "name" : "now" }', "", [("now", {})]),
        ('<tool_call>{"name": "now", "parameters": {}}</tool_call>', "", [("now", {})]),
        (
            '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>{<tool_call>\\""}}</tool_call>',
            "",
            [("weather", {"city": '</tool_call>{<tool_call>"'})],
        ),
        ("a <tool_call> is a tag", "a <tool_call> is a tag", []),
        (f"<tool_call> {CALL}", "<tool_call>", [OSLO]),
        ("ends with <tool", "ends with <tool", []),
        ("  spaces  \n", "  spaces  \n", []),
        ("", "", []),
    ],
)
def test_replies_of_hermes(text: str, content: str, calls: list[Any]) -> None:
    for cut in range(len(text) + 1):
        found = streamed(text, HERMES, cut)[1]
        assert (found.content, pairs(found.calls)) == (content, calls)


@pytest.mark.parametrize(
    "inner",
    [
        '{"name": "weather", "arguments": {"city": "Oslo"',
        '{"name": "weather", "arguments": {"city": Oslo}}',
        '{"name": "weather", "arguments": {"city": "Oslo",}}',
        '{"name": "weather", "arguments": "Oslo"}',
        '{"name": "weather", "arguments": ["Oslo"]}',
        '{"name": "weather"}',
        '{"name": ["weather"], "arguments": {}}',
        '{"name": "weather", "arguments": {}, "parameters": {}}',
        '{"name": "weather", "arguments": {}, "more": {}}',
        '{"name": "Weather", "arguments": {}}',
        '{"name": "weather ", "arguments": {}}',
        '{"name": "weather", "arguments": {"days": NaN}}',
        '{"name": "weather", "arguments": {"days": 1e999}}',
        '{"name": "weather", "arguments": {"city": "Oslo\n"}}',
        '{"name": "weather", "arguments": {}} and more',
        '[{"name": "now", "arguments": {}}, {"name": "then", "arguments": {}}]',
        "[" * 5000 + "]" * 5000,
        '{"name": "weather", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3001,
        "",
        "weather",
        "[]",
    ],
)
def test_what_is_no_call_is_text_to_the_last_character(inner: str) -> None:
    text = f"So: <tool_call>\n{inner}\n</tool_call> Yes. "
    assert parse(text, HERMES, TOOLS) == Parsed(text, ())
    step = max(1, len(text) // 40)
    assert streamed(text, HERMES, *range(step, len(text), step))[1] == Parsed(text, ())


def test_a_call_inside_the_arguments_of_an_unknown_tool_is_not_made() -> None:
    inner = "<tool_call><function=now></function></tool_call>"
    text = f"<tool_call><function=other><parameter=x>{inner}</parameter></function></tool_call>"
    assert parse(text, CODER, TOOLS) == Parsed(text, ())
    listed = json.dumps({"name": "other", "arguments": {"x": '<tool_call>{"name": "now", "arguments": {}}'}})
    text = f"<tool_call>{listed}</tool_call>"
    assert parse(text, HERMES, TOOLS) == Parsed(text, ())


@pytest.mark.parametrize(
    "text",
    [
        "You said <tool_call>, and I say [TOOL_CALLS].",
        '```json\n{"name": "now", "arguments": {}}\n```',
        'Say {"name": "now", "parameters": {}} to call it.',
        '{"name": "now", "parameters": {}} is how one calls it',
        '{"answer": 42}',
        '{"name": "Ada", "parameters": null}',
        "<|python_tag|>print(1)",
    ],
)
@pytest.mark.parametrize("family", [HERMES, LLAMA, CODER], ids=lambda family: family.name)
def test_text_about_calls_is_text(family: Any, text: str) -> None:
    for cut in range(len(text)):
        assert streamed(text, family, cut)[1] == Parsed(text, ())


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (' {"name": "now", "parameters": {}}\n', [("now", {})]),
        ('<|python_tag|>{"name": "now", "parameters": {}}', [("now", {})]),
        ('{"type": "function", "name": "now", "parameters": {}}', [("now", {})]),
        ('{"name": "now", "parameters": {}}; {"name": "weather", "parameters": {"city": "Oslo"}}', [("now", {}), OSLO]),
    ],
)
def test_replies_of_llama(text: str, calls: list[Any]) -> None:
    for cut in range(len(text)):
        found = streamed(text, LLAMA, cut)[1]
        assert (found.content, pairs(found.calls)) == ("", calls)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("\n3\n", {"days": 3}),
        ("\nTrue\n", {"exact": True}),
        ("\nfalse\n", {"exact": False}),
        ("\nNone\n", {"note": None}),
        ("\n12\n", {"note": "12"}),
        ("\n12\n", {"city": "12"}),
        ("\nnull\n", {"city": "null"}),
        ("\n two\n\nlines \n", {"city": " two\n\nlines "}),
        ("\n</function> <b>\n", {"city": "</function> <b>"}),
        ("\nthree\n", None),
    ],
)
def test_values_between_tags_are_of_their_schemas_types(value: str, read: Any) -> None:
    (name,) = read or ["days"]
    found = parse(f"<tool_call><function=weather><parameter={name}>{value}</parameter></function>", CODER, TOOLS)
    assert pairs(found.calls) == ([("weather", read)] if read else [])


def test_half_a_character_in_arguments_can_be_sent_on() -> None:
    (call,) = parse('<tool_call>{"name": "weather", "arguments": {"city": "\\ud83d"}}</tool_call>', HERMES, TOOLS).calls
    assert json.loads(call.arguments.encode()) == {"city": "\ud83d"}


def test_a_long_reply_is_read_in_linear_time() -> None:
    parser = Parser(HERMES, TOOLS)
    text = '<tool_call>{"name": "weather", "arguments": {"city": "' + 'x "'.replace('"', '\\"') * 40_000 + '"}}'
    for at in range(0, len(text), 4):
        assert parser.feed(text[at : at + 4]) == ""
    assert parser.end() == ""
    assert len(parser.calls) == 1


def test_what_the_prompt_holds_of_a_call_is_no_text() -> None:
    rest = '{"name": "now", "arguments": {}}\n</tool_call>'
    for cut in range(len(rest)):
        found = streamed(rest, HERMES, cut, opening="<tool_call>\n")[1]
        assert (found.content, pairs(found.calls)) == ("", [("now", {})])
        assert streamed(rest[: cut // 2], HERMES, opening="<tool_call>\n")[1] == Parsed(rest[: cut // 2], ())


def test_ids_are_what_mistrals_templates_take() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[A-Za-z0-9]{9}", one) for one in ids)


# ---- Requests.


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ("weather", "expected a list"),
        ([3], "tool 1: it is no function"),
        ([{"type": "retrieval"}], "tool 1: it is no function"),
        ([{"type": "function", "function": {"name": "a b"}}], "name is 'a b'"),
        ([{"type": "function", "function": {"name": "x" * 65}}], "name is"),
        ([{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}], "no JSON schema of an"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], "no JSON schema of an"),
        ([{"type": "function", "function": {"name": "a", "description": 3}}], "description is no text"),
        ([NOW, NOW], "tool now is given twice"),
        ([NOW] * 129, "there are 129 tools"),
        ([{}, {"function": {}}], "tool 2: name is None"),
    ],
)
def test_tools_that_make_no_sense(tools: Any, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        checked_tools(tools)


def test_a_tool_without_parameters_has_none() -> None:
    assert checked_tools(None) == checked_tools([]) == {}
    assert TOOLS["now"].definition["function"]["parameters"] == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, Choice("auto")),
        ("none", Choice("none")),
        ("required", Choice("required")),
        ({"type": "function", "function": {"name": "now"}}, Choice("named", "now")),
    ],
)
def test_choices(choice: Any, wanted: Choice) -> None:
    assert checked_choice(choice, TOOLS) == wanted


@pytest.mark.parametrize(
    ("choice", "tools", "problem"),
    [
        ("required", {}, "there are no tools"),
        ({"type": "function", "function": {"name": "then"}}, TOOLS, "the tools are weather, now"),
        ("now", TOOLS, "expected none, auto, required"),
        ({"type": "allowed_tools"}, TOOLS, "expected none, auto, required"),
    ],
)
def test_choices_that_make_no_sense(choice: Any, tools: Any, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        checked_choice(choice, tools)
    assert checked_choice(None, {}) == Choice("none")


@pytest.mark.parametrize("name", BY_NAME)
def test_a_schema_that_cannot_be_kept_is_named(name: str) -> None:
    mail = {"type": "object", "properties": {"to": {"type": "array", "items": {"format": "email", "type": "string"}}}}
    tools = checked_tools([NOW, {"type": "function", "function": {"name": "mail", "parameters": mail}}])
    with pytest.raises(SettingsError, match=r'tool mail: parameters, unsupported format "email".* at #.*/items'):
        forced(Choice("required"), tools, BY_NAME[name])
    assert forced(Choice("named", "now"), tools, BY_NAME[name])


def test_text_with_conditions_cannot_be_kept_between_tags() -> None:
    schema = {"type": "object", "properties": {"code": {"type": "string", "pattern": "^[A-Z]$"}}}
    tools = checked_tools([{"type": "function", "function": {"name": "look", "parameters": schema}}])
    with pytest.raises(SettingsError, match=r"tool look: parameters, text with conditions.*#/properties/code"):
        forced(Choice("required"), tools, CODER)
    assert forced(Choice("required"), tools, HERMES)


# ---- Messages.


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (calling({"city": "Oslo"}), ""),
        (calling({"city": "Oslo"}, content="I look."), ""),
        ({"role": "assistant", "content": "Yes.", "tool_calls": None}, ""),
        ({"role": "assistant", "content": None}, "`content` of type null"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "`content` of type null"),
        ({"role": "user", "content": None, "tool_calls": calling({})["tool_calls"]}, "`content` of type null"),
        ({"role": "assistant", "tool_calls": {}}, "`tool_calls` of type object"),
        ({"role": "assistant", "tool_calls": [3]}, "of which 1 is no function's"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "", "arguments": "{}"}}]}, "has name ''"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[]"}}]}, "no JSON object"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}, "no JSON object"),
        ({"role": "assistant", "tool_calls": [{"id": "<s>", "function": {"name": "a", "arguments": ""}}]}, "has id"),
    ],
)
def test_calls_in_messages(message: dict[str, Any], problem: str) -> None:
    found = check_messages([QUESTION, message])
    assert found.startswith("message 2 has") if problem else found == ""
    assert problem in found


def test_messages_as_templates_take_them() -> None:
    made = prepared([QUESTION, calling({"city": "日本"}), {**ANSWER, "refusal": None}])
    assert made[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "日本"}}}
        ],
    }
    assert made[2] == {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "4 degrees"}
    assert prepared(made) == made


def test_a_tools_message_answers_a_call_before_it() -> None:
    assert check_tool_turns([QUESTION, calling({}), ANSWER]) == ""
    assert "message 2 has tool_call_id 'call00001'" in check_tool_turns([QUESTION, ANSWER, calling({})])
    assert "message 2 has tool_call_id None" in check_tool_turns([QUESTION, {"role": "tool", "content": "x"}])


def test_a_message_without_text_or_calls_is_refused() -> None:
    assert check_messages([QUESTION, calling({"city": "Oslo"})]) == ""
    assert "`content` of type null" in check_messages(
        [QUESTION, {"role": "assistant", "content": None, "tool_calls": []}]
    )
