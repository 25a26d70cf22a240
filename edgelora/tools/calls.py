"""How models write calls: ways, each a class, that read what they are known by. Those without JSON are in
`literal_calls`, those of the channels of a reply in `channel_calls`.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.json_grammar import is_a
from edgelora.tools.cursor import Cursor, NoCall, Reading, RefusedCall, parsed_json
from edgelora.tools.definitions import Tools
from edgelora.tools.schema_types import types_of

_MARKER = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")


@dataclass(frozen=True)
class ToolCall:
    """A call in a reply.

    Attributes:
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


def call(name: Any, arguments: Any, tools: Tools) -> ToolCall:
    """A call of one of `tools`.

    Raises:
        RefusedCall: the tool is unknown, or the arguments are no object.
    """
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict):
        raise RefusedCall
    text = json.dumps(arguments, ensure_ascii=False)
    if any("\ud800" <= character <= "\udfff" for character in text):  # half characters, which no UTF-8 holds
        text = json.dumps(arguments)
    return ToolCall(name, text)


@dataclass(frozen=True)
class Family(ABC):
    """A way to write calls.

    Attributes:
        opening: what the first call begins with, and maybe every one.
        closing: what ends it; it may be missing at the end of a reply.
        in_content: the template writes no calls of a conversation; they go into the message's content.
        declares: by what a template is known that writes no calls and shows tools; the opening, if it is empty.
        answers: what a template writes before a tool's answer; one that has it in a turn of its own would show the
            model what it has never seen.
        before_json: what a reply begins with that is JSON and no call.
    """

    name: str
    opening: str
    closing: str = ""
    in_content: bool = False
    declares: str = ""
    answers: str = ""
    before_json: str = ""

    @property
    def literals(self) -> tuple[str, ...]:
        """The fixed texts of a call."""
        return self.opening, self.closing

    @property
    def markers(self) -> frozenset[str]:
        """Texts that a vocabulary may have as control tokens, and that a reader of replies has to see."""
        return frozenset(found for text in self.literals for found in _MARKER.findall(text))

    @property
    def begins_reply(self) -> bool:
        """Whether a reply that begins with a JSON object may be a call as a whole."""
        return False

    def written(self, calls: Sequence[ToolCall]) -> tuple[str, str, str]:
        """Opening, calls and closing, as the model writes them: of a family that may be `in_content`."""
        raise NotImplementedError(f"calls of {self.name} in a message's content")

    @abstractmethod
    def read(self, cursor: Cursor, tools: Tools) -> Reading[list[ToolCall]]:
        """The calls that begin where the cursor is.

        Raises:
            NoCall: there is none.
        """

    def _closes(self, cursor: Cursor) -> Reading[bool]:
        """Whether the closing is next, or the end of the reply, which stands for it."""
        yield from cursor.skip_space()
        if self.closing and (yield from cursor.takes(self.closing)):
            return True
        return (yield from cursor.is_over())


@dataclass(frozen=True)
class JsonCalls(Family):
    """JSON objects with the tool's name and arguments, one after the other or in a list.

        <tool_call>
        {"name": "weather", "arguments": {"city": "Oslo"}}
        </tool_call>

    Attributes:
        key: what the arguments are called when they are written; read are both "arguments" and "parameters".
        name_key: what the tool's name is called.
        in_list: the objects are in a list.
        bare: a reply that is an object, or several with a `;` between, needs no opening.
    """

    key: str = "arguments"
    name_key: str = "name"
    in_list: bool = False
    bare: bool = False

    @property
    def begins_reply(self) -> bool:
        return self.bare

    def read(self, cursor: Cursor, tools: Tools) -> Reading[list[ToolCall]]:
        yield from cursor.takes(self.opening)
        values: list[Any] = []
        while True:
            yield from cursor.skip_space()
            value = yield from cursor.json()
            values += value if isinstance(value, list) else [value]
            if not (self.closing or self.bare) or (yield from self._closes(cursor)):
                break
            if self.bare and not (yield from cursor.takes(";")):
                raise NoCall
        if not values:
            raise RefusedCall
        return [self._call(value, tools) for value in values]

    def _call(self, value: Any, tools: Tools) -> ToolCall:
        fields = value if type(value) is dict else {}
        keys = fields.keys() - {self.name_key, "id", "type", "tool_call_id"}
        if len(keys) != 1 or not keys <= {"arguments", "parameters"}:
            raise RefusedCall
        return call(fields.get(self.name_key), fields[keys.pop()], tools)

    def written(self, calls: Sequence[ToolCall]) -> tuple[str, str, str]:
        texts = [
            f'{{"{self.name_key}": {json.dumps(each.name)}, "{self.key}": {json.dumps(json.loads(each.arguments))}}}'
            for each in calls
        ]
        return self.opening, f"[{', '.join(texts)}]" if self.in_list else "\n".join(texts), self.closing


@dataclass(frozen=True)
class NamedCalls(Family):
    """The tool's name, and its arguments as JSON: `[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}`, or several of them
    between opening and closing:

        <|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{"city": "Oslo"}
        <|tool_call_end|><|tool_calls_section_end|>

    White space may stand for a line break, and be where there is none.

    Attributes:
        before: what every call begins with, where several are between opening and closing.
        identifier: what an id may follow, between name and arguments.
        first_id: the id of a reply's first call, where every call has one: they are counted.
        separator: what the arguments follow.
        behind: what ends every call, where several are between opening and closing.
    """

    before: str = ""
    identifier: str = ""
    first_id: str = ""
    separator: str = ""
    behind: str = ""

    @property
    def literals(self) -> tuple[str, ...]:
        return (*super().literals, self.before, self.identifier, self.separator, self.behind)

    def read(self, cursor: Cursor, tools: Tools) -> Reading[list[ToolCall]]:
        yield from cursor.expect(self.opening)
        found = [(yield from self._one(cursor))]
        while self.closing and not (yield from self._closes(cursor)):
            if not self.before:
                raise NoCall
            found.append((yield from self._one(cursor)))
        return [call(name, arguments, tools) for name, arguments in found]

    def _one(self, cursor: Cursor) -> Reading[tuple[str, Any]]:
        yield from _expect_lines(cursor, self.before)
        yield from cursor.skip_space()
        name = yield from cursor.word("_-")
        if self.identifier and (yield from cursor.takes(self.identifier)):
            yield from cursor.word()
        yield from _expect_lines(cursor, self.separator)
        yield from cursor.skip_space()
        arguments = yield from cursor.json()
        if self.behind and not (yield from self._is_over(cursor)):
            yield from _expect_lines(cursor, self.behind)
        return name, arguments

    @staticmethod
    def _is_over(cursor: Cursor) -> Reading[bool]:
        yield from cursor.skip_space()
        return (yield from cursor.is_over())


def _expect_lines(cursor: Cursor, text: str) -> Reading[None]:
    """Go behind `text`, with any white space before its lines.

    Raises:
        NoCall: it is not next.
    """
    for line in text.split("\n") if text else ():
        yield from cursor.skip_space()
        yield from cursor.expect(line)


@dataclass(frozen=True)
class TaggedCalls(Family):
    """Tags around each argument; text stands between them as it is, everything else as JSON.

        <tool_call>
        <function=weather>
        <parameter=city>
        Oslo
        </parameter>
        </function>
        </tool_call>

    Attributes:
        function: what is before the name, behind it, and at the end.
        argument: what is before an argument's name, behind it, before its value, and behind that.
        has_lines: a value stands on lines of its own.
    """

    function: tuple[str, str, str] = ("", "", "")
    argument: tuple[str, str, str, str] = ("", "", "", "")
    has_lines: bool = False

    @property
    def literals(self) -> tuple[str, ...]:
        return (*super().literals, *self.function, *self.argument)

    def read(self, cursor: Cursor, tools: Tools) -> Reading[list[ToolCall]]:
        yield from cursor.expect(self.opening)
        found: list[tuple[str, dict[str, str]]] = []
        while True:
            yield from cursor.skip_space()
            yield from cursor.expect(self.function[0])
            name = yield from cursor.word()
            yield from cursor.expect(self.function[1])
            found.append((name, (yield from self._arguments(cursor))))
            if not self.function[2]:  # nothing but the closing tells that no argument is missing
                yield from cursor.skip_space()
                yield from cursor.expect(self.closing)
                break
            if (yield from self._closes(cursor)):
                break
        return [call(name, _typed(texts, name, tools), tools) for name, texts in found]

    def _arguments(self, cursor: Cursor) -> Reading[dict[str, str]]:
        before, behind, value_before, value_behind = self.argument
        found: dict[str, str] = {}
        while True:
            yield from cursor.skip_space()
            if not (yield from cursor.takes(before)):
                if self.function[2]:
                    yield from cursor.expect(self.function[2])
                return found
            name = (yield from cursor.until(behind)).strip()
            if value_before:
                yield from cursor.skip_space()
                yield from cursor.expect(value_before)
            value = yield from cursor.until(value_behind)
            if name in found:
                raise NoCall
            found[name] = value.removeprefix("\n").removesuffix("\n") if self.has_lines else value


_PYTHON = {"True": True, "False": False, "None": None}
"""Templates write these values so, and models after them."""


def _typed(texts: Mapping[str, str], name: str, tools: Tools) -> dict[str, Any]:
    """Arguments as the tool's schema has them.

    Raises:
        RefusedCall: the tool is unknown, or a value is of a type that its schema does not have.
    """
    if name not in tools:
        raise RefusedCall
    schema = tools[name].parameters
    properties = schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    return {key: _value(text, types_of(known.get(key), schema)) for key, text in texts.items()}


def _value(text: str, types: frozenset[str] | None) -> Any:
    if types == frozenset(("string",)):
        return text
    stripped = text.strip()
    try:
        value = _PYTHON[stripped] if stripped in _PYTHON else parsed_json(stripped)
    except NoCall:
        value = text
    if types is None or any(is_a(value, name) for name in types - {"string"}):
        return value
    if "string" in types:
        return text
    raise RefusedCall
