"""What is odd about the turns of a conversation: what no tokenizer reads, and what is no reason to refuse it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise

from edgelora.messages import Message

HALF_CHARACTER = 'half of a character (JSON can write it: "\\ud83d"), which no tokenizer reads'

EMPTY = "with an empty turn"
ASSISTANT_FIRST = "that begin with the assistant"
UNANSWERED_CALL = "with a call of a tool that no tool answers"


def has_half_character(*parts: object) -> bool:
    """Whether texts somewhere in `parts` hold one half of a surrogate pair without the other."""
    try:
        json.dumps(parts, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def oddities(messages: Sequence[Message]) -> Iterator[str]:
    """What is noticed, each once, in words that go on with "rows ..."."""
    if any(not message["content"].strip() and not message.get("tool_calls") for message in messages):
        yield EMPTY
    spoken = [message for message in messages if message["role"] != "system"]
    if spoken and spoken[0]["role"] == "assistant":
        yield ASSISTANT_FIRST
    for role in ("user", "assistant"):
        if any(one["role"] == two["role"] == role for one, two in pairwise(spoken)):
            yield f"with two turns of the {role}'s in a row"
    if any(one.get("tool_calls") and two["role"] != "tool" for one, two in pairwise(spoken)):
        yield UNANSWERED_CALL
