"""Replies of several messages, each on a channel: OpenAI's harmony format, which gpt-oss writes.

    <|channel|>analysis<|message|>They ask for weather.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>

https://github.com/openai/harmony/blob/main/docs/format.md; a recipient may come before the channel as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgelora.tools.calls import Family, ToolCall, call
from edgelora.tools.cursor import Cursor, Reading
from edgelora.tools.definitions import Tools

THOUGHTS = "analysis"
_CHANNEL = re.compile(r"<\|channel\|>(\w+)")
_RECIPIENT = re.compile(r"to=([\w.-]+)")
_TOOL = "functions."


@dataclass(frozen=True)
class Header:
    """What a message says of itself before `<|message|>`.

    Attributes:
        tool: which it calls; empty where it is for the reader.
    """

    channel: str
    tool: str


@dataclass(frozen=True)
class ChannelCalls(Family):
    """Messages that are for a tool are calls, the others text, but for the thoughts, which are nobody's to read.

    Attributes:
        opening: what a message begins with whose header follows.
        header_end: what its text follows.
        message_end: what ends it; a call ends the reply.
    """

    header_end: str = "<|message|>"
    message_end: str = "<|end|>"

    @property
    def literals(self) -> tuple[str, ...]:
        return (*super().literals, self.header_end, self.message_end, "<|constrain|>", "<|start|>")

    def begins_message(self, cursor: Cursor) -> Reading[bool]:
        """Whether a message begins where the cursor, which stays, is; a reply may be text alone."""
        begin = cursor.at
        yield from cursor.skip_space()
        for sign in ("<|channel|>", "<|start|>", "to="):
            if (yield from cursor.takes(sign)):
                cursor.at = begin
                return True
        cursor.at = begin
        return False

    def header(self, text: str) -> Header:
        """The header of a message that begins with `text`."""
        channels, recipient = _CHANNEL.findall(text), _RECIPIENT.search(text)
        name = recipient[1] if recipient else ""
        return Header(channels[-1] if channels else "", name.removeprefix(_TOOL) if name.startswith(_TOOL) else "")

    def read(self, cursor: Cursor, tools: Tools) -> Reading[list[ToolCall]]:
        header = self.header((yield from cursor.until(self.header_end)))
        yield from cursor.skip_space()
        arguments = yield from cursor.json()
        return [call(header.tool, arguments, tools)]
