"""What is odd about the turns of a conversation, and yet no reason to refuse it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from edgelora.messages import Message

EMPTY = "with an empty turn"
ASSISTANT_FIRST = "that begin with the assistant"
UNANSWERED_CALL = "with a call of a tool that no tool answers"


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
