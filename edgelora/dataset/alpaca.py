"""Rows of Alpaca's format: an instruction, perhaps something to do it to, and what came out.

    {"instruction": "Translate into English.", "input": "wasserdicht", "output": "waterproof"}

The user's turn is the instruction and, after a blank line, the input. `system` is the system prompt, and `history` has
earlier turns (`[[question, answer], ...]`), as LLaMA-Factory has them.
https://github.com/tatsu-lab/stanford_alpaca#data-release
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.dataset.chat import conversation_from, from_cell
from edgelora.json_type import json_type
from edgelora.messages import Conversation, user_message


def read_alpaca(data: Mapping[str, Any], source: str) -> Conversation | str:
    if "output" not in data:
        return "`instruction` without `output`"
    given = {name: data.get(name) for name in ("instruction", "input", "output", "system")}
    texts = {name: "" if value is None else value for name, value in given.items()}
    for name, value in texts.items():
        if not isinstance(value, str):
            return f"`{name}` is a JSON {json_type(value)}, expected a string"
    if not texts["output"].strip():
        return "`output` is empty, so nothing to learn from"
    history = from_cell(data.get("history")) or []
    if not isinstance(history, list) or not all(_is_exchange(exchange) for exchange in history):
        return "`history` is no list of [question, answer]"
    messages: list[Any] = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    for question, answer in history:
        messages += [user_message(question), {"role": "assistant", "content": answer}]
    asked = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    return conversation_from(
        [*messages, user_message(asked), {"role": "assistant", "content": texts["output"]}], source
    )


def _is_exchange(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
