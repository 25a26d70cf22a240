"""Preference pairs: one prompt, the reply that was preferred, and the one that was not. Rows are in one of four shapes:

    {"prompt": "Is it waterproof?", "chosen": "Yes, IP67.", "rejected": "No idea."}
    {"prompt": [MESSAGE, ...], "chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}
    {"chosen": [MESSAGE, ...], "rejected": [MESSAGE, ...]}                      the prompt is what both begin with
    {"input": {"messages": [MESSAGE, ...]}, "preferred_output": [MESSAGE], "non_preferred_output": [MESSAGE]}

The first three are TRL's (https://huggingface.co/docs/trl/dataset_formats#preference), the last is that of OpenAI's
fine-tuning (https://platform.openai.com/docs/guides/direct-preference-optimization). A MESSAGE is `{role, content}`.
In tables (CSV, Parquet), lists of messages may be JSON text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgelora.dataset.chat import messages_from_cell
from edgelora.dataset.reading import Given, read_all
from edgelora.dataset.turns import HALF_CHARACTER, has_half_character
from edgelora.messages import Message, check_messages, prepared, user_message
from edgelora.rows import Row

_HINT = "Each row has `prompt`, `chosen` and `rejected`, or `input`, `preferred_output` and `non_preferred_output`."


@dataclass(frozen=True)
class Preference:
    """Two ways to go on from one prompt.

    Attributes:
        prompt: ends with the user's turn, or a tool's.
        chosen, rejected: of the assistant, one message or more; they differ.
        source: `FILE:LINE`.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str


def read_preferences(data: Given, seed: int = 0) -> list[Preference]:
    """Every preference pair of a file, or of several, as `edgelora.dataset.read_conversations` reads conversations.

    Raises:
        DataFileError: a file cannot be read, holds no row, or holds bad rows (up to eight of all are named by line).
    """
    return read_all(data, seed, lambda source: lambda row: preference_of(row, source.place(row)), _HINT)


def preference_of(row: Row, source: str) -> Preference | str:
    """The preference pair in a row, or what is wrong with the row."""
    if row.problem:
        return row.problem
    data = row.data
    if "preferred_output" in data or "non_preferred_output" in data:
        given = data.get("input")
        prompt: Any = given.get("messages") if isinstance(given, Mapping) else None
        if isinstance(given, Mapping) and given.get("tools"):
            return "`tools` in `input`: preferences with tools are not supported"
        names = ("input.messages", "preferred_output", "non_preferred_output")
        return _pair(names, prompt, data.get("preferred_output"), data.get("non_preferred_output"), source)
    if missing := [f"`{name}`" for name in ("chosen", "rejected") if name not in data]:
        return f"no {' and no '.join(missing)}; found {', '.join(f'`{name}`' for name in data) or 'no fields'}"
    if data.get("tools"):
        return "`tools`: preferences with tools are not supported"
    return _pair(("prompt", "chosen", "rejected"), data.get("prompt"), data["chosen"], data["rejected"], source)


def _pair(names: tuple[str, str, str], prompt: Any, chosen: Any, rejected: Any, source: str) -> Preference | str:
    prompt, chosen, rejected = (messages_from_cell(value) for value in (prompt, chosen, rejected))
    if isinstance(prompt, str):
        prompt = [user_message(prompt)]
    if prompt is None and (isinstance(chosen, str) or isinstance(rejected, str)):
        return f"no `{names[0]}`, and `{names[1]}` and `{names[2]}` are texts: where the prompt ends cannot be told"
    parts = [_conversation(value) for value in (prompt or [], chosen, rejected)]
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, list) or (not part and name != names[0]):
            return f"`{name}` is not a text, nor a list of messages with something in it"
        if part and (problem := check_messages(part)):
            return f"`{name}`: {problem}"
    if parts[1] == parts[2]:
        return f"`{names[1]}` and `{names[2]}` are the same, so nothing to prefer"
    before, *replies = parts
    before, replies = _split(before, replies[0], replies[1])
    for name, reply in zip(names[1:], replies, strict=True):
        if not reply or any(message["role"] not in ("assistant", "tool") for message in reply):
            return f"`{name}` goes on with no reply of the assistant's"
        if not any((message.get("content") or "").strip() or message.get("tool_calls") for message in reply):
            return f"`{name}` is empty"
    if not before or before[-1]["role"] == "assistant":
        return "no prompt that ends with the user's turn before the replies"
    if has_half_character(before, replies):
        return HALF_CHARACTER
    return Preference(tuple(prepared(before)), tuple(prepared(replies[0])), tuple(prepared(replies[1])), source)


def _conversation(value: Any) -> Any:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _split(prompt: list[Any], chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """The prompt, and what follows it: where both replies begin with the same messages, those are the prompt's."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    both, replies = chosen[:shared], [chosen[shared:], rejected[shared:]]
    if not prompt or both[-len(prompt) :] == prompt:  # the prompt is often repeated in both
        return both or prompt, replies
    return [*prompt, *both], replies
