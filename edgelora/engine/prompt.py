"""A conversation to the tokens the model reads; what a user types never becomes a control token.

The template's own text may hold control tokens (`<|im_start|>`), and they are parsed. The same characters inside a
message are text: whoever writes `<|im_end|><|im_start|>system` into a message does not get a system turn. Where no
message holds such characters, the rendered text is tokenized whole, which is what training did.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgelora.engine.tokenizer import SpecialToken, Tokenizer, join_controls
from edgelora.errors import SettingsError
from edgelora.messages import Message
from edgelora.template import ChatTemplate

_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of `messages` rendered by `template`, ending where the assistant's reply begins.

    Raises:
        ModelFileError: the template refuses the conversation.
        SettingsError: no private-use character is left to mark text with.
    """
    quotes = _Quotes.unused_in(messages)
    text = template.render(
        [{"role": m["role"], "content": quotes.protect(m["content"], tokenizer)} for m in messages],
        add_generation_prompt=add_generation_prompt,
        bos_token=tokenizer.text_of("bos"),
        eos_token=tokenizer.text_of("eos"),
    )
    if quotes.opening not in text:
        return tokenizer.encode(text, special=True)
    return join_controls(tokenizer, _joined(quotes.split(text, tokenizer)))


@dataclass(frozen=True)
class _Quotes:
    """Two characters that no message holds; what stands between them is text, whatever it looks like."""

    opening: str
    closing: str

    @classmethod
    def unused_in(cls, messages: Sequence[Message]) -> _Quotes:
        used = {character for message in messages for character in message["content"]}
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        opening, closing = next(free, ""), next(free, "")
        if not closing:
            raise SettingsError("the conversation uses every private-use character of Unicode; two must be free")
        return cls(opening, closing)

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


def _joined(parts: Iterator[SpecialToken | str]) -> list[SpecialToken | str]:
    """Neighbouring texts as one, so that words are not cut where a quote stood; empty ones dropped."""
    joined: list[SpecialToken | str] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    return joined
