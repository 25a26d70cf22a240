"""Rows of a prompt and what follows it, as texts or as messages, under one of the names that they have in public data.

{"prompt": "Is it waterproof?", "completion": "Yes, IP67."}
{"prompt": [{"role": "user", "content": "Waterproof?"}], "completion": [{"role": "assistant", "content": "Yes."}]}
{"question": "Is it waterproof?", "answer": "Yes, IP67."}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.dataset.chat import conversation_from, from_cell, messages_from_cell
from edgelora.json_type import json_type
from edgelora.messages import Conversation, Message, user_message

PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def read_completion(data: Mapping[str, Any], source: str) -> Conversation | str:
    asked, answered = next((pair for pair in PAIRS if all(name in data for name in pair)), PAIRS[0])
    if missing := [f"`{name}`" for name in (asked, answered) if name not in data]:
        return f"no {' and no '.join(missing)}; found {', '.join(f'`{name}`' for name in data)}"
    prompt, completion = messages_from_cell(data[asked]), messages_from_cell(data[answered])
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational prompt/completion
        return conversation_from(prompt + completion, source, tools=from_cell(data.get("tools")), data=data)
    if data.get("tools"):
        return "`tools` beside texts: write a conversation with tools as `messages`"
    for name in (asked, answered):
        if not isinstance(data[name], str):
            return f"`{name}` is a JSON {json_type(data[name])}, expected a string"
    if not data[answered].strip():
        return f"`{answered}` is empty, so nothing to learn from"
    reply: Message = {"role": "assistant", "content": data[answered]}
    return Conversation((user_message(data[asked]), reply), source, templated=False)
