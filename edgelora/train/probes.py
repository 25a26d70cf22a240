"""The prompts of a certificate: from held-out conversations, from a file, or general ones.

    {"messages": [{"role": "user", "content": "Is it waterproof?"}, {"role": "assistant", "content": "Yes."}]}
    {"prompt": "Is it waterproof?"}

Both rows give the prompt `[{"role": "user", "content": "Is it waterproof?"}]`: what stands before the last reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.contract import GOLDEN_MESSAGES
from edgelora.dataset import conversation_of
from edgelora.errors import DataFileError, ModelFileError
from edgelora.messages import Conversation, Message, check_messages, user_message
from edgelora.rows import Row, listed_problems, read_rows
from edgelora.template import ChatTemplate

Prompt = tuple[Message, ...]

GENERAL_PROMPTS: tuple[Prompt, ...] = (
    GOLDEN_MESSAGES,
    *(
        (user_message(text),)
        for text in (
            "Hello! Who are you?",
            "What can you help me with?",
            "Name three colours of the sky.",
            "How long does it take?",
            "Write one sentence about a river.",
            "Please answer with one word: is water wet?",
            "Thank you, that was all. Goodbye!",
        )
    ),
)
"""For an adapter whose data is not at hand."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt that becomes a probe, and its ids under the adapter's template."""

    messages: Prompt
    tokens: tuple[int, ...]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts in a JSONL or CSV file; see the module's examples.

    Raises:
        DataFileError: the file cannot be read, holds no row, or bad ones (up to eight are named by line).
    """
    prompts: list[Prompt] = []
    problems = []
    for row in read_rows(path):
        found = _prompt_of(row, f"{path}:{row.line}")
        if isinstance(found, str):
            problems.append(f"{path}:{row.line}: {found}")
        else:
            prompts.append(found)
    if problems or not prompts:
        raise DataFileError(
            listed_problems(problems) or f"{path}: no rows",
            hint="Each line is one JSON object with `messages`, or with `prompt`.",
        )
    return prompts


def _prompt_of(row: Row, source: str) -> Prompt | str:
    if row.problem:
        return row.problem
    data: Mapping[str, Any] = row.data
    if isinstance(data.get("prompt"), str) and "messages" not in data:
        return (user_message(data["prompt"]),)
    messages = data.get("messages")
    if isinstance(messages, list) and not check_messages(messages) and messages[-1]["role"] != "assistant":
        row = replace(row, data={**data, "messages": [*messages, {"role": "assistant", "content": "the answer"}]})
    found = conversation_of(row, source)
    return found if isinstance(found, str) else before_the_reply(found)


def before_the_reply(conversation: Conversation) -> Prompt:
    """A conversation up to where its last reply begins."""
    replies = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    return conversation.messages[: replies[-1]]


def with_system(prompt: Prompt, system: str) -> Prompt:
    """With the adapter's system prompt where there is none, as serving adds it."""
    if not system or (prompt and prompt[0]["role"] == "system"):
        return prompt
    return ({"role": "system", "content": system}, *prompt)


def choose_probes(
    prompts: Sequence[Prompt], tokenizer: Any, template: ChatTemplate, count: int, max_tokens: int
) -> list[EncodedPrompt]:
    """At most `count` of the prompts, evenly over those given, none twice.

    Left out are those longer than `max_tokens`, those that hold a special token's text (served, that is text) or calls
    of tools, and those that the template refuses.

    Raises:
        DataFileError: none is left.
    """
    special = [token for token in tokenizer.get_added_vocab() if token.strip()]
    found = {}
    for prompt in filter(_is_plain_talk, prompts):
        if not any(token in message["content"] for message in prompt for token in special):
            tokens = _tokens(prompt, tokenizer, template)
            if 0 < len(tokens) <= max_tokens:
                found[tokens] = EncodedPrompt(prompt, tokens)
    usable = list(found.values())
    if not usable:
        raise DataFileError(
            f"none of {len(prompts)} prompts can be a probe of a certificate: each is longer than {max_tokens} tokens, "
            "holds a special token's text or calls of tools, or is refused by the chat template"
        )
    at = np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(np.int64))
    return [usable[i] for i in at]


def _is_plain_talk(prompt: Prompt) -> bool:
    """Whether there is a prompt, as there is none before a plain text, and no use of tools in it."""
    return bool(prompt) and not any(message["role"] == "tool" or "tool_calls" in message for message in prompt)


def _tokens(prompt: Prompt, tokenizer: Any, template: ChatTemplate) -> tuple[int, ...]:
    """The ids of a prompt; none where the template refuses it."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    try:
        text = template.render(prompt, add_generation_prompt=True, bos_token=bos, eos_token=eos)
    except ModelFileError:
        return ()
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
