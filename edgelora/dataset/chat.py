"""Rows of OpenAI's fine-tuning format, also with tools.

    {"messages": [{"role": "user", "content": "Is it waterproof?"}, {"role": "assistant", "content": "Yes, IP67."}]}
    {"tools": [{"type": "function", "function": {"name": "weather", ...}}], "messages": [..., {"role": "assistant",
        "tool_calls": [{"id": "a1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]}]}

`weight` on an assistant message is OpenAI's: 0 leaves it out of training, 1 is the default. In tables (CSV, Parquet),
`messages` and `tools` may be JSON text. Other fields (`id`, `name`, `metadata` ...) do not reach a chat template.
https://platform.openai.com/docs/guides/supervised-fine-tuning
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgelora.errors import SettingsError
from edgelora.messages import Conversation, check_messages, check_tool_turns, prepared
from edgelora.tools.definitions import checked_tools

SUPERSEDED = {"functions": "tools", "function_call": "tool_calls"}
"""OpenAI's fields of before tools, and what took their place."""


def read_chat(data: Mapping[str, Any], source: str) -> Conversation | str:
    return conversation_from(from_cell(data["messages"]), source, tools=from_cell(data.get("tools")), data=data)


def conversation_from(
    messages: Any, source: str, *, tools: Any = None, data: Mapping[str, Any] | None = None
) -> Conversation | str:
    """The conversation of `messages` and `tools` as OpenAI has them, or what is wrong with them.

    Args:
        data: the row, to look for fields that are not supported any more.
    """
    problem = _superseded(data or {}, messages) or check_messages(messages) or _weights(messages) or _answers(messages)
    if problem:
        return problem
    try:
        shown = tuple(tool.definition for tool in checked_tools(tools or None).values())
    except SettingsError as error:
        return error.message
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [index for index in replies if messages[index].get("weight", 1) != 0]
    if not any(_says_something(messages[index]) for index in trained):
        return "no assistant message with text (and a weight other than 0), so nothing to learn from"
    if messages[-1]["role"] != "assistant":
        return f"the last message is the {messages[-1]['role']}'s, expected the assistant's reply"
    untrained = frozenset(replies).difference(trained)
    return Conversation(tuple(prepared(messages[: trained[-1] + 1])), source, untrained=untrained, tools=shown)


def from_cell(value: Any) -> Any:
    """A list that a table's cell holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def messages_from_cell(value: Any) -> Any:
    """Messages that a table's cell holds as JSON text; any other text, also a JSON list of something else, as it is."""
    found = from_cell(value)
    is_messages = isinstance(found, list) and found and all(isinstance(item, dict) and "role" in item for item in found)
    return found if is_messages else value


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls") or (message.get("content") or "").strip())


def _superseded(data: Mapping[str, Any], messages: Any) -> str:
    """Fields in which a row describes or calls tools in the old way; empty text if there are none."""
    found = [f"`{name}` (now `{new}`)" for name, new in SUPERSEDED.items() if data.get(name)]
    for index, message in enumerate(messages if isinstance(messages, list) else [], start=1):
        names = [name for name in SUPERSEDED if isinstance(message, dict) and message.get(name)]
        found += [f"`{name}` in message {index} (now `{SUPERSEDED[name]}`)" for name in names]
    return f"{', '.join(found)}: not supported any more" if found else ""


def _weights(messages: Sequence[Mapping[str, Any]]) -> str:
    for index, message in enumerate(messages, start=1):
        weight = message.get("weight")
        if weight is not None and weight not in (0, 1):
            return f"message {index} has weight {weight!r}, expected 0 or 1"
        if weight is not None and message["role"] != "assistant":
            return f"message {index} has a weight, which only the assistant's messages take"
    return ""


def _answers(messages: list[Any]) -> str:
    """What keeps tools' messages from answering calls; many sets of data leave out the ids on both sides."""
    tools_say = [message for message in messages if message["role"] == "tool"]
    if any(message.get("tool_call_id") for message in tools_say):
        return check_tool_turns(messages)
    calls = 0
    for index, message in enumerate(messages, start=1):
        calls += len(message.get("tool_calls") or ())
        calls -= message["role"] == "tool"
        if calls < 0:
            return f"message {index} is a tool's, and answers no call before it"
    return ""
