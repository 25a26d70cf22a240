"""Conversations: what a message is, what makes sense to a chat template, and calls of tools in between.

    {"role": "user", "content": "Is it waterproof?"}
    {"role": "assistant", "content": "Yes, IP67."}

In a conversation with tools, an assistant's message may have `tool_calls`, and then no text; a tool's answers one:

    {"role": "assistant", "content": null, "tool_calls": [{"id": "a1", "type": "function",
        "function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}}]}
    {"role": "tool", "tool_call_id": "a1", "content": "4 degrees"}

Files of them are read by `edgelora.dataset` (training) and `edgelora.batch_rows` (a batch).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from edgelora.json_type import json_type

ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    """One turn. `tool_calls`, `tool_call_id` and `name` are those of conversations with tools (`prepared`)."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class Conversation:
    """Messages that make sense to a chat template (`prepared`), and where they came from; in training, the last one is
    trained.

    Attributes:
        templated: False for a prompt/completion row: without a chat template such a row is plain text to continue.
        untrained: indices of assistant messages with weight 0.
        tools: what the model may call, as a request's `tools`.
        plain: a text that no chat template ever sees: the content of the only message, which is the assistant's.
    """

    messages: tuple[Message, ...]
    source: str
    templated: bool = True
    untrained: frozenset[int] = frozenset()
    tools: tuple[Mapping[str, Any], ...] = ()
    plain: bool = False


def user_message(content: str) -> Message:
    return {"role": "user", "content": content}


def check_messages(value: object) -> str:
    """What keeps `value` from being a list of chat messages; empty if nothing does."""
    if not isinstance(value, list):
        return f"`messages` is a JSON {json_type(value)}, expected a list of {{role, content}} objects"
    if not value:
        return "`messages` is empty"
    for index, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            return f"message {index} is a JSON {json_type(message)}, expected an object with `role` and `content`"
        if message.get("role") not in ROLES:
            return f"message {index} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}"
        if message["role"] == "assistant" and message.get("tool_calls") is not None:
            if problem := _tool_calls(message["tool_calls"]):
                return f"message {index} has `tool_calls` {problem}"
            if message["tool_calls"] and message.get("content") is None:
                continue
        if not isinstance(message.get("content"), str):
            return f"message {index} has `content` of type {json_type(message.get('content'))}, expected a string"
        if message["role"] == "system" and index > 1:
            return f"message {index} is a system message; only the first may be"
    return ""


def _tool_calls(calls: Any) -> str:
    """What keeps `calls` from being those of an assistant's message; empty if nothing does."""
    if not isinstance(calls, list):
        return f"of type {json_type(calls)}, expected a list"
    for number, call in enumerate(calls, start=1):
        function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else 0
        if not isinstance(function, dict):
            return f"of which {number} is no function's"
        name, identifier = function.get("name"), call.get("id", "")
        if not isinstance(name, str) or not _CALL_NAME.fullmatch(name):
            return f"of which {number} has name {name!r}, expected 1 to 64 letters, digits, _ and -"
        if not isinstance(identifier, str) or not _CALL_ID.fullmatch(identifier):
            return f"of which {number} has id {identifier!r}, expected letters, digits, _, -, . and :"
        if not isinstance(_arguments(function.get("arguments")), dict):
            return f"of which {number} has `arguments` that are no JSON object as text"
    return ""


_CALL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CALL_ID = re.compile(r"[A-Za-z0-9_.:-]{0,128}")


def _arguments(given: Any) -> Any:
    """A call's arguments, which OpenAI has as JSON text, and Hugging Face's chat templates as an object."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given or "{}")
    except (ValueError, RecursionError):
        return None


def check_tool_turns(messages: list[Any]) -> str:
    """What keeps the tools' messages from answering the calls before them; empty if nothing does.

    Args:
        messages: of which `check_messages` finds nothing.
    """
    open_calls: set[str] = set()
    for index, message in enumerate(messages, start=1):
        open_calls |= {call.get("id", "") for call in message.get("tool_calls") or ()}
        if message["role"] == "tool":
            identifier = message.get("tool_call_id")
            if not isinstance(identifier, str) or identifier not in open_calls:
                return f"message {index} has tool_call_id {identifier!r}, which is that of no call before it"
    return ""


def prepared(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as chat templates take them, with nothing that those do not read: arguments of calls as objects, text
    that is null as empty, and a tool's message with the tool's name.

    Args:
        messages: of which `check_messages` finds nothing.
    """
    made, names = list[Message](), dict[str, str]()
    for given in messages:
        message: Message = {"role": given["role"], "content": given.get("content") or ""}
        if given["role"] == "assistant" and given.get("tool_calls"):
            message["tool_calls"] = [_prepared_call(call) for call in given["tool_calls"]]
            names |= {call["id"]: call["function"]["name"] for call in message["tool_calls"] if "id" in call}
        if given["role"] == "tool":
            identifier = given.get("tool_call_id")
            name = given.get("name") or names.get(str(identifier))
            message |= {"tool_call_id": identifier} if isinstance(identifier, str) else {}
            message |= {"name": name} if isinstance(name, str) else {}
        made.append(message)
    return made


def _prepared_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": call["function"]["name"], "arguments": _arguments(call["function"]["arguments"])}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function}
