"""Rows of ShareGPT's format, and of those that keep OpenAI's messages under its name.

    {"conversations": [{"from": "human", "value": "Is it waterproof?"}, {"from": "gpt", "value": "Yes, IP67."}]}
    {"conversations": [{"role": "user", "content": "Is it waterproof?"}, {"role": "assistant", "content": "Yes."}]}

`system` beside `conversations` is the system prompt. Tools are read from OpenAI's `messages` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.dataset.chat import conversation_from, from_cell
from edgelora.json_type import json_type
from edgelora.messages import Conversation

FIELDS = ("conversations", "conversation")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
OF_TOOLS = ("function_call", "observation", "tool")


def read_sharegpt(data: Mapping[str, Any], source: str) -> Conversation | str:
    name = next(field for field in FIELDS if field in data)
    turns = from_cell(data[name])
    if not isinstance(turns, list):
        return f"`{name}` is a JSON {json_type(turns)}, expected a list of {{from, value}} objects"
    if data.get("tools"):
        return "`tools` beside `conversations`: write a conversation with tools as `messages`"
    messages = []
    for index, turn in enumerate(turns, start=1):
        message = _message(turn, index)
        if isinstance(message, str):
            return message
        messages.append(message)
    if not messages:
        return f"`{name}` is empty"
    if isinstance(data.get("system"), str) and data["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": data["system"]})
    return conversation_from(messages, source, data=data)


def _message(turn: Any, index: int) -> dict[str, Any] | str:
    if not isinstance(turn, dict):
        return f"turn {index} is a JSON {json_type(turn)}, expected an object with `from` and `value`"
    if "from" not in turn:
        return turn  # OpenAI's, checked as those are
    if turn["from"] in OF_TOOLS:
        return f"turn {index} is from {turn['from']!r}: write a conversation with tools as `messages`"
    if not isinstance(turn["from"], str) or turn["from"] not in SPEAKERS:
        return f"turn {index} is from {turn['from']!r}, expected one of {', '.join(SPEAKERS)}"
    weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
    return {"role": SPEAKERS[turn["from"]], "content": turn.get("value"), **weight}
