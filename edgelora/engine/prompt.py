"""A conversation to the tokens the model reads; what a user types never becomes a control token.

The template's own text may hold control tokens (`<|im_start|>`), and they are parsed. The same characters inside a
message are text: whoever writes `<|im_end|><|im_start|>system` into a message does not get a system turn. Where no
message holds such characters, the rendered text is tokenized whole, which is what training did. So are the texts in
calls of tools and in the definitions of tools, which come from outside as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.engine.tokenizer import SpecialToken, Tokenizer, join_controls
from edgelora.errors import SettingsError
from edgelora.messages import Message, prepared
from edgelora.template import ChatTemplate
from edgelora.tools.writing import everywhere, written_message

_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


_THOUGHT_ENDS = {"<think>": "\n</think>\n\n", "<|START_THINKING|>": "<|END_THINKING|>"}


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    opening: str = "",
) -> list[int]:
    """The ids of `messages` rendered by `template`, ending where the assistant's reply begins, or goes on.

    Args:
        tools: what the template shows to the model (`ToolUse.shown`).
        opening: the beginning of the reply; control tokens in it are control tokens. Where the template has the reply
            begin with a thought (`<think>` and the like), that ends before.

    Raises:
        ModelFileError: the template refuses the conversation.
        SettingsError: no private-use character is left to mark text with; or the conversation has calls of tools, and
            the template does not support them.
    """
    conversation = prepared(messages)
    quotes = _Quotes.unused_in(conversation, tools or ())

    def protect(text: str) -> str:
        return quotes.protect(text, tokenizer)

    text = template.render(
        [written_message(template, message, protect) for message in conversation],
        add_generation_prompt=add_generation_prompt,
        bos_token=tokenizer.text_of("bos"),
        eos_token=tokenizer.text_of("eos"),
        tools=everywhere(tools, protect),
    )
    text = quotes.unescaped(text)
    begun = next((begin for begin in _THOUGHT_ENDS if text.rstrip().endswith(begin)), "")
    if opening and begun:
        text = text.rstrip() + _THOUGHT_ENDS[begun]
    text += opening
    if quotes.opening not in text:
        return tokenizer.encode(text, special=True)
    return join_controls(tokenizer, _joined(quotes.split(text, tokenizer)))


@dataclass(frozen=True)
class _Quotes:
    """Two characters that no message holds; what stands between them is text, whatever it looks like."""

    opening: str
    closing: str

    @classmethod
    def unused_in(cls, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> _Quotes:
        text = json.dumps([messages, tools], ensure_ascii=False, default=list)
        used = set(text)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        free = (one for one in free if not any(escape[1:] in text for escape in _escapes(one)))
        opening, closing = next(free, ""), next(free, "")
        if not closing:
            raise SettingsError("the conversation uses every private-use character of Unicode; two must be free")
        return cls(opening, closing)

    def unescaped(self, text: str) -> str:
        """`text` with the quotes that a template wrote as escapes (`tojson` of a kind, Python's `repr`)."""
        for quote in (self.opening, self.closing):
            for escape in _escapes(quote):
                text = text.replace(escape, quote)
        return text

    def protect(self, content: str, tokenizer: Tokenizer) -> str:
        """`content` with quotes around every control token in it, and around one cut off at either end: the message
        before or after may hold the rest of it."""
        pattern = tokenizer.control_pattern
        if pattern is None:
            return content
        longest = max(map(len, tokenizer.control_tokens))
        lengths = range(min(longest, len(content)), 0, -1)
        tail = next((n for n in lengths if content[-n:] in tokenizer.control_starts), 0)
        head = next((n for n in lengths if n <= len(content) - tail and content[:n] in tokenizer.control_ends), 0)
        middle = content[head : len(content) - tail]
        middle = pattern.sub(lambda match: self.quote(match[0]), middle)
        return self.quote(content[:head]) + middle + self.quote(content[len(content) - tail :])

    def quote(self, text: str) -> str:
        return f"{self.opening}{text}{self.closing}" if text else ""

    def split(self, text: str, tokenizer: Tokenizer) -> Iterator[SpecialToken | str]:
        """Control tokens of the template, and everything else as text without quotes."""
        controls = [tokenizer.control_pattern.pattern] if tokenizer.control_pattern else []
        quoted = f"{self.opening}[^{self.opening}{self.closing}]*{self.closing}"
        position = 0
        for match in re.finditer("|".join([quoted, *controls]), text):
            yield text[position : match.start()]
            control = tokenizer.control_tokens.get(match[0])
            yield control if control else match[0].strip(self.opening + self.closing)
            position = match.end()
        yield text[position:]


def _escapes(character: str) -> tuple[str, str]:
    return json.dumps(character)[1:-1], repr(character)[1:-1]


def _joined(parts: Iterator[SpecialToken | str]) -> list[SpecialToken | str]:
    """Neighbouring texts as one, so that words are not cut where a quote stood; empty ones dropped."""
    joined: list[SpecialToken | str] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    return joined
