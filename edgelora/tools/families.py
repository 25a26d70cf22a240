"""Which way a chat template writes calls, found by letting it write one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from edgelora.errors import ModelFileError, SettingsError
from edgelora.messages import Message, user_message
from edgelora.template import PROBE_TOOL, ChatTemplate
from edgelora.tools.calls import Family, JsonCalls, NamedCalls, TaggedCalls, ToolCall
from edgelora.tools.channel_calls import ChannelCalls
from edgelora.tools.definitions import checked_tools
from edgelora.tools.literal_calls import LiteralCalls
from edgelora.tools.literals import TOKEN_QUOTES
from edgelora.tools.reading import parse

FAMILIES: tuple[Family, ...] = (
    JsonCalls("hermes", "<tool_call>", "</tool_call>"),  # Hermes, Qwen 2.5 and 3, Granite 4
    TaggedCalls(  # Qwen3-Coder, Qwen 3.5, Nemotron 3
        "qwen3-coder",
        "<tool_call>",
        "</tool_call>",
        function=("<function=", ">", "</function>"),
        argument=("<parameter=", ">", "", "</parameter>"),
        has_lines=True,
    ),
    TaggedCalls(
        "seed",
        "<seed:tool_call>",
        "</seed:tool_call>",
        function=("<function=", ">", "</function>"),
        argument=("<parameter=", ">", "", "</parameter>"),
    ),
    TaggedCalls(
        "glm", "<tool_call>", "</tool_call>", argument=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    ),
    TaggedCalls(
        "minimax-m2",
        "<minimax:tool_call>",
        "</minimax:tool_call>",
        function=('<invoke name="', '">', "</invoke>"),
        argument=('<parameter name="', '">', "", "</parameter>"),
    ),
    NamedCalls("functionary-3.1", "<function=", "</function>", separator=">"),
    JsonCalls("mistral", "[TOOL_CALLS]", in_list=True),
    NamedCalls("mistral-args", "[TOOL_CALLS]", identifier="[CALL_ID]", separator="[ARGS]"),
    JsonCalls("granite-3", "<|tool_call|>", in_list=True),
    JsonCalls("apriel", "<tool_calls>", "</tool_calls>", in_list=True),
    JsonCalls("nemotron-2", "<TOOLCALL>", "</TOOLCALL>", in_list=True),
    JsonCalls("gigachat", "<|function_call|>"),
    JsonCalls("llama-3", "<|python_tag|>", key="parameters", bare=True),
    JsonCalls(  # Command-R7B, Command A
        "command-r7b", "<|START_ACTION|>", "<|END_ACTION|>", key="parameters", name_key="tool_name", in_list=True
    ),
    NamedCalls(
        "deepseek-r1",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        separator="\n```json\n",
        behind="\n```<｜tool▁call▁end｜>",
    ),
    NamedCalls(
        "deepseek-v3.1",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        before="<｜tool▁call▁begin｜>",
        separator="<｜tool▁sep｜>",
        behind="<｜tool▁call▁end｜>",
    ),
    NamedCalls(
        "kimi-k2",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        before="<|tool_call_begin|>functions.",
        identifier=":",
        first_id="0",
        separator="<|tool_call_argument_begin|>",
        behind="<|tool_call_end|>",
    ),
    LiteralCalls("lfm2", "<|tool_call_start|>", "<|tool_call_end|>", in_list=True, declares="List of tools: "),
    LiteralCalls(
        "gemma-4",
        "<|tool_call>",
        "<tool_call|>",
        begin="call:",
        brackets=("{", "}"),
        equals=":",
        notation=TOKEN_QUOTES,
        answers="<|tool_response>response:",
    ),
    ChannelCalls(
        "gpt-oss",
        "<|channel|>commentary to=functions.",
        before_json="<|channel|>final <|constrain|>json<|message|>",
    ),
)
"""Those that real templates were read with."""

_PROBE = checked_tools([PROBE_TOOL])
_CALL = ToolCall("probe_tool", '{"probed": "some text"}')
_QUESTION = user_message("A question?")
_SPOKEN = "SPOKEN"
_FUNCTION = {"name": _CALL.name, "arguments": json.loads(_CALL.arguments)}
_CALLING: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "probe0001", "type": "function", "function": _FUNCTION}],
}
_ANSWER: Message = {"role": "tool", "tool_call_id": "probe0001", "name": _CALL.name, "content": _SPOKEN}


def required_family(template: ChatTemplate) -> Family:
    """The way that a template writes calls.

    Raises:
        SettingsError: it does not support tools, or in a way that is not known here.
    """
    found = _found(template.source)
    if isinstance(found, str):
        raise SettingsError(
            f"tools cannot be used with this chat template: {found}",
            hint='Leave out tools, or say "tool_choice": "none".',
        )
    return found


def family_of(template: ChatTemplate) -> Family | None:
    """The way that a template writes calls; None where it does not support tools, or in a way that is not known."""
    found = _found(template.source)
    return None if isinstance(found, str) else found


def loses_calls(template: ChatTemplate) -> bool:
    """Whether a template writes the first call of a message alone; one that refuses such a message loses none."""
    return _loses_calls(template.source)


@lru_cache(maxsize=32)
def _loses_calls(source: str) -> bool:
    calls = [
        {"id": f"probe000{at}", "type": "function", "function": {"name": _CALL.name, "arguments": {"probed": said}}}
        for at, said in enumerate(("FIRST", "SECOND"))
    ]
    message: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    try:
        text = _rendered(ChatTemplate(source), [_QUESTION, message])
    except ModelFileError:
        return False
    return "FIRST" in text and "SECOND" not in text


@lru_cache(maxsize=32)
def _found(source: str) -> Family | str:
    """The family, or why there is none."""
    template = ChatTemplate(source)
    try:
        shown = _rendered(template, [_QUESTION])
        if not template.shows_tools:
            return "it renders the same text with and without them"
        called, turn = _written(template)
    except ModelFileError as error:
        return error.message
    if _CALL.name not in called:
        writable = (family for family in FAMILIES if isinstance(family, JsonCalls | LiteralCalls))
        named = [family for family in writable if (family.declares or family.opening) in shown]
        return replace(named[0], in_content=True) if len(named) == 1 else "it writes no calls of a conversation"
    family = next((family for family in FAMILIES if _reads(family, called) or _reads(family, turn)), None)
    if family is None:
        return f"the way it writes calls is not known here: {called.strip()[:200]}"
    if family.answers and family.answers not in _answered(template):
        return f"it writes the answers of tools without {family.answers}, which {family.name} models read them by"
    return family


def _reads(family: Family, text: str) -> bool:
    """Whether a text holds the call of the probe as a family writes it."""
    if isinstance(family, JsonCalls) and family.in_list != _has_list(text, family.opening):
        return False
    return parse(text.strip(), family, _PROBE).calls == (_CALL,)


def _has_list(text: str, opening: str) -> bool:
    return re.search(rf"{re.escape(opening)}\s*\[", text) is not None


def _written(template: ChatTemplate) -> tuple[str, str]:
    """What a template writes for a message that is a call: where it differs from one that is text, and the turn."""
    spoken: Message = {"role": "assistant", "content": _SPOKEN}
    one, other = (_rendered(template, [_QUESTION, message]) for message in (_CALLING, spoken))
    at = other.rfind(_SPOKEN)
    begin = _common(one, other[:at])
    end = len(one) - _common(one[:begin:-1], other[: at + len(_SPOKEN) - 1 : -1])
    return one[begin:end], one[one.rfind(_QUESTION["content"]) + len(_QUESTION["content"]) :]


def _answered(template: ChatTemplate) -> str:
    """A conversation with a tool's answer; empty where the template refuses it."""
    try:
        return _rendered(template, [_QUESTION, _CALLING, _ANSWER])
    except ModelFileError:
        return ""


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _rendered(template: ChatTemplate, messages: Sequence[Message]) -> str:
    return template.render(messages, add_generation_prompt=False, tools=[PROBE_TOOL], bos_token="<s>", eos_token="</s>")
