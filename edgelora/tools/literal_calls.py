"""Calls that look like a program's: a name, and arguments in brackets, each as a name and a value that is no JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.tools.calls import Family, ToolCall, call
from edgelora.tools.cursor import Cursor, NoCall, Reading
from edgelora.tools.definitions import Tools
from edgelora.tools.literals import PYTHON, Notation, members


@dataclass(frozen=True)
class LiteralCalls(Family):
    """`<|tool_call_start|>[weather(city='Oslo', days=3), now()]<|tool_call_end|>`, or a call alone:
    `<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3}<tool_call|>`.

    Attributes:
        begin: what comes before the name.
        brackets: what the arguments stand between.
        equals: what is between an argument's name and its value.
        in_list: the calls are in a list.
    """

    begin: str = ""
    brackets: tuple[str, str] = ("(", ")")
    equals: str = "="
    notation: Notation = PYTHON
    in_list: bool = False

    @property
    def literals(self) -> tuple[str, ...]:
        return (*super().literals, *self.notation.quotes)

    def read(self, cursor: Cursor, tools: Tools) -> Reading[list[ToolCall]]:
        yield from cursor.expect(self.opening)
        yield from cursor.skip_space()
        if self.in_list:
            yield from cursor.expect("[")
        found = [(yield from self._one(cursor))]
        while self.in_list and not (yield from cursor.takes("]")):
            yield from cursor.expect(",")
            found.append((yield from self._one(cursor)))
        if not (yield from self._closes(cursor)):
            raise NoCall
        return [call(name, arguments, tools) for name, arguments in found]

    def written(self, calls: Sequence[ToolCall]) -> tuple[str, str, str]:
        before, behind = self.brackets
        texts = [
            f"{self.begin}{each.name}{before}"
            + ", ".join(f"{name}{self.equals}{_written(value)}" for name, value in json.loads(each.arguments).items())
            + behind
            for each in calls
        ]
        return self.opening, f"[{', '.join(texts)}]" if self.in_list else "\n".join(texts), self.closing

    def _one(self, cursor: Cursor) -> Reading[tuple[str, dict[str, Any]]]:
        before, behind = self.brackets
        yield from cursor.skip_space()
        yield from cursor.expect(self.begin)
        name = yield from cursor.word("_-")
        yield from cursor.expect(before)
        arguments = yield from members(cursor, self.notation, self.equals, behind)
        yield from cursor.skip_space()
        return name, arguments


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | dict) else str(value)
