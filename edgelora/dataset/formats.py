"""The formats that a training row may have, and which of them a row has: seen from its fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgelora.dataset.alpaca import read_alpaca
from edgelora.dataset.chat import read_chat
from edgelora.dataset.completion import read_completion
from edgelora.dataset.plain_text import read_plain_text
from edgelora.dataset.sharegpt import read_sharegpt
from edgelora.dataset.turns import HALF_CHARACTER, has_half_character
from edgelora.messages import Conversation
from edgelora.rows import Row

MESSAGE_FIELDS = frozenset({"role", "content", "name", "weight", "tool_calls", "tool_call_id", "from", "value"})
Reader = Callable[[Mapping[str, Any], str], Conversation | str]


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        marks: fields of which any one tells that a row has this format.
        reads: fields that are read beside them; all others are ignored.
        read: the conversation in a row, given its fields and source, or what is wrong with them.
        shape: what a row looks like, for messages.
    """

    name: str
    marks: tuple[str, ...]
    reads: tuple[str, ...]
    read: Reader
    shape: str

    def ignored(self, data: Mapping[str, Any]) -> list[str]:
        """Fields of a row, and of its messages (`messages[].audio`), that do not reach the model."""
        found = [name for name in data if name not in self.marks and name not in self.reads]
        for name in self.marks:
            messages = data.get(name)
            for message in messages if isinstance(messages, list) else ():
                unread = message.keys() - MESSAGE_FIELDS if isinstance(message, dict) else ()
                found += [f"{name}[].{field}" for field in sorted(unread) if message[field] is not None]
        return list(dict.fromkeys(found))


def _preference_pair(_data: Mapping[str, Any], _source: str) -> str:
    return "a preference pair, of which training on replies would see one side; it is for --objective dpo"


FORMATS = (
    Format(
        "preference pair",
        ("chosen", "rejected", "preferred_output", "non_preferred_output"),
        ("prompt", "input"),
        _preference_pair,
        "`prompt`, `chosen` and `rejected`",
    ),
    Format("chat", ("messages",), ("tools",), read_chat, "`messages`"),
    Format("ShareGPT", ("conversations", "conversation"), ("system",), read_sharegpt, "`conversations`"),
    Format(
        "Alpaca",
        ("instruction",),
        ("input", "output", "system", "history"),
        read_alpaca,
        "`instruction`, `input` and `output`",
    ),
    Format(
        "prompt/completion",
        ("completion", "prompt", "question"),
        ("response", "answer", "tools"),
        read_completion,
        "`prompt` and `completion`",
    ),
    Format("plain text", ("text",), (), read_plain_text, "`text`"),
)
"""In the order in which they are looked for: what has fields of two formats is in the first of them."""

SHAPES = "; ".join(f"{format_.shape} ({format_.name})" for format_ in FORMATS[1:])
HINT = f"A row has one of: {SHAPES}."


def format_of(data: Mapping[str, Any]) -> Format | None:
    """The format of a row with these fields; None where no field tells of one."""
    return next((format_ for format_ in FORMATS if any(name in data for name in format_.marks)), None)


def conversation_of(row: Row, source: str) -> Conversation | str:
    """The training conversation in a row, or what is wrong with the row."""
    if row.problem:
        return row.problem
    found = format_of(row.data)
    if found is None:
        fields = ", ".join(f"`{name}`" for name in row.data) or "no fields"
        return f"expected {', or '.join(format_.shape for format_ in FORMATS[1:])}; found {fields}"
    conversation = found.read(row.data, source)
    if isinstance(conversation, Conversation) and has_half_character(conversation.messages, conversation.tools):
        return HALF_CHARACTER
    return conversation
