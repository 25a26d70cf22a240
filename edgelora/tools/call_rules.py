"""The rules of a family's calls: what a grammar of calls is put together from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgelora.json_grammar import ANNOTATIONS, Converter, grammar_of, problems_of
from edgelora.tools.calls import Family, JsonCalls, NamedCalls, TaggedCalls
from edgelora.tools.channel_calls import ChannelCalls
from edgelora.tools.definitions import Tool
from edgelora.tools.free_text import literal, rules_without
from edgelora.tools.literal_calls import LiteralCalls
from edgelora.tools.literals import PYTHON
from edgelora.tools.schema_types import types_of
from edgelora.tools.token_quotes import TokenQuotesConverter

_WORDS = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|[A-Za-z][A-Za-z0-9-]*')
_GAP = '"\\n"? " "{0,4}'


@dataclass(frozen=True)
class CallRules:
    """How calls are written, as GBNF but for the first two.

    Attributes:
        opening: what they begin with.
        shared: what all of them go on with.
        body: what follows of one call, or of all that there may be between one opening and one closing.
        close: what ends them; empty for nothing.
        ends_itself: without what closes it, what may be the end of the body need not be it.
        again: another opening may follow.
    """

    opening: str
    shared: str
    body: str
    close: str = ""
    ends_itself: bool = True
    again: bool = False

    @property
    def whole(self) -> str:
        """The rule for all of it."""
        shared = "line" if self.shared == "\n" else literal(self.shared)
        return f"{literal(self.opening)} {shared} {self.body} {self.close}".rstrip()


def call_rules(family: Family, tools: Sequence[Tool], made: Rules, *, many: bool) -> CallRules:
    """The rules of calls of some tools, which go into `made`.

    Args:
        many: whether they may be several.
    """
    for kind, rules in _BY_KIND.items():
        if isinstance(family, kind):
            return rules(family, tools, made, many)
    raise NotImplementedError(f"calls of {type(family).__name__}")


def _json_calls(family: JsonCalls, tools: Sequence[Tool], made: Rules, many: bool) -> CallRules:
    begin = '{"tool_call_id": "' if family.name_key == "tool_name" else "{"
    identifier = ' [0-9]{1,2} "\\", "' if family.name_key == "tool_name" else ""
    calls = []
    for tool in tools:
        name = f'"{family.name_key}": {json.dumps(tool.name)}, "{family.key}": '
        calls.append(f'{literal(begin)}{identifier} {literal(name)} {made.arguments(tool)} "}}"')
    one = made.add("call", " | ".join(calls))
    close = f"line {literal(family.closing)}" if family.closing else ""
    if family.in_list:
        more = f' ("," {_GAP} {one})*' if many else ""
        return CallRules(family.opening, "", f'line " "? "[" {_GAP} {one}{more} {_GAP} "]"', close)
    if not family.closing:
        return CallRules(family.opening, "", f"line {one}")
    return CallRules(family.opening, "\n", one, close, again=True)


def _named_calls(family: NamedCalls, tools: Sequence[Tool], made: Rules, many: bool) -> CallRules:
    arguments = {tool.name: f"{made.arguments(tool)} {literal(family.behind)}" for tool in tools}
    number = f"{literal(family.identifier)} [0-9]{{1,2}}" if family.first_id else '""'
    calls = [
        f"{literal(family.before + name)} {number} {literal(family.separator)} {rule}"
        for name, rule in arguments.items()
    ]
    one = made.add("call", " | ".join(calls))
    close = f"line {literal(family.closing)}" if family.closing else ""
    more = f" (line {one})*" if many and family.before else ""
    if len(tools) > 1:
        return CallRules(family.opening, "", f"{one}{more}", close)
    identifier = family.identifier + family.first_id if family.first_id else ""
    (name,) = arguments
    begin = f"{family.before}{name}{identifier}{family.separator}"
    return CallRules(family.opening, begin, f"{arguments[name]}{more}", close)


def _literal_calls(family: LiteralCalls, tools: Sequence[Tool], made: Rules, many: bool) -> CallRules:
    if family.notation is PYTHON:
        before, behind = map(literal, family.brackets)
        calls = [f"{literal(tool.name)} {before} {_keywords(family, tool, made)} {behind}" for tool in tools]
    else:
        calls = [f"{literal(tool.name)} {made.arguments(tool, TokenQuotesConverter)}" for tool in tools]
    one = made.add("call", " | ".join(calls))
    close = f"line {literal(family.closing)}"
    if not family.in_list:
        return CallRules(family.opening, family.begin, one, close, again=True)
    more = f' ("," " "? {one})*' if many else ""
    return CallRules(family.opening, "[", f'{one}{more} "]"', close)


def _keywords(family: LiteralCalls, tool: Tool, made: Rules) -> str:
    """The rule for arguments that are names and JSON's values, in the order of the schema."""
    if not made.keeps(tool):
        pair = f"[A-Za-z_] [A-Za-z0-9_]* {literal(family.equals)} {made.schema(tool, True, '')}"
        return made.add("arguments", f'({pair} (", " {pair})*)?')
    properties, required, problem = _properties(tool)
    if problem:
        return made.problem(tool, problem)
    rest, firsts = '""', ['""']
    for name, described in reversed(list(properties.items())):
        if not name.isidentifier():
            return made.problem(tool, f"a name that cannot stand without quotes: {name!r}")
        value = made.schema(tool, _with_definitions(described, tool) or True, f"#/properties/{name}")
        pair = made.add("pair", f"{literal(name + family.equals)} {value}")
        firsts = [f"{pair} {rest}", *(() if name in required else firsts)]
        rest = made.add("rest", f'", " {pair} {rest}' if name in required else f'(", " {pair})? {rest}')
    return made.add("arguments", " | ".join(firsts))


def _channel_calls(family: ChannelCalls, tools: Sequence[Tool], made: Rules, _many: bool) -> CallRules:
    behind = f" <|constrain|>json{family.header_end}"
    if len(tools) == 1:
        return CallRules(family.opening, tools[0].name + behind, made.arguments(tools[0]))
    calls = [f"{literal(tool.name + behind)} {made.arguments(tool)}" for tool in tools]
    return CallRules(family.opening, "", made.add("call", " | ".join(calls)))


def _tagged_calls(family: TaggedCalls, tools: Sequence[Tool], made: Rules, _many: bool) -> CallRules:
    before, behind, end = family.function
    last = f" {literal(end)}" if end else ""
    calls = [
        f"{literal(before + tool.name + behind)} line {_tagged_arguments(family, tool, made)}{last}" for tool in tools
    ]
    one = made.add("call", " | ".join(calls))
    shared = "\n" if before else ""  # without tags the name stands right behind the opening
    return CallRules(family.opening, shared, one, f"line {literal(family.closing)}", bool(end), again=True)


def _properties(tool: Tool) -> tuple[Mapping[str, Any], Sequence[str], str]:
    """The properties and the required ones of a tool whose arguments are written one by one; or what is wrong."""
    schema = tool.parameters
    unsupported = sorted(schema.keys() - ANNOTATIONS - {"type", "properties", "required", "additionalProperties"})
    properties, required = schema.get("properties"), schema.get("required", [])
    if unsupported or not isinstance(properties, Mapping) or not isinstance(required, list):
        return {}, [], f"unsupported {', '.join(unsupported) or 'properties or required of another type'} at #"
    if missing := [name for name in required if name not in properties]:
        return {}, [], f"required but without a schema: {', '.join(map(str, missing))}"
    return properties, required, ""


def _with_definitions(schema: Any, tool: Tool) -> Any:
    """A property's schema with what its `$ref` point into."""
    if not isinstance(schema, Mapping):
        return schema
    return {**schema, **{key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}}


def _tagged_arguments(family: TaggedCalls, tool: Tool, made: Rules) -> str:
    """The rule for all arguments of a tool, in the order of its schema."""
    before, behind, value_before, value_behind = map(literal, family.argument)
    lines = '"\\n"' if family.has_lines else '""'
    then = f"line {value_before}" if family.argument[2] else '""'

    def pair(name: str, value: str) -> str:
        return made.add("pair", f"{before} {name} {behind} {then} {lines} {value} {lines} {value_behind} line")

    if not made.keeps(tool):
        return f"{pair('[A-Za-z_] [A-Za-z0-9_-]*', made.text_before(family.argument[3]))}*"
    properties, required, problem = _properties(tool)
    if problem:
        return made.problem(tool, problem)
    parts = []
    for name, described in properties.items():
        if family.argument[1] in name or name != name.strip():
            return made.problem(tool, f"a name that tags cannot hold: {name!r}")
        one = pair(literal(name), _tagged_value(family, tool, name, described, made))
        parts.append(one if name in required else f"{one}?")
    return made.add("arguments", " ".join(parts) or '""')


def _tagged_value(family: TaggedCalls, tool: Tool, name: str, schema: Any, made: Rules) -> str:
    place, end = f"#/properties/{name}", family.argument[3]
    if schema is True:
        return made.text_before(end)
    if not isinstance(schema, Mapping):
        return made.problem(tool, f"no schema that a value can fit at {place}")
    types = types_of(schema, tool.parameters)
    if types is not None and "string" not in types:
        return made.schema(tool, _with_definitions(schema, tool), place)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and all(_is_plain(value, end) for value in values):
        return made.add("value", " | ".join(map(literal, values)))
    if values is not None or not _is_free_text(schema):
        return made.problem(tool, f"text with conditions, which tags cannot keep, at {place}")
    return made.text_before(end)


def _is_plain(value: Any, end: str) -> bool:
    return isinstance(value, str) and end not in value and value == value.strip("\n")


def _is_free_text(schema: Any) -> bool:
    """Whether a schema allows every text; of what else it allows, that the types alone say what."""
    if not isinstance(schema, Mapping):
        return schema is True
    keywords = schema.keys() - ANNOTATIONS
    if "anyOf" in keywords:
        each = schema["anyOf"]
        return keywords == {"anyOf"} and isinstance(each, list) and all(_is_free_text(one) for one in each)
    return keywords <= {"type"}


_BY_KIND: Mapping[type[Family], Callable[[Any, Sequence[Tool], Rules, bool], CallRules]] = {
    JsonCalls: _json_calls,
    NamedCalls: _named_calls,
    TaggedCalls: _tagged_calls,
    LiteralCalls: _literal_calls,
    ChannelCalls: _channel_calls,
}


@dataclass
class Rules:
    """The rules of one grammar, and what kept some from being made.

    Args:
        keeps_all: arguments fit their schemas also where a tool is not strict.
    """

    keeps_all: bool
    rules: dict[str, str] = field(default_factory=lambda: {"line": '"\\n"?'})
    problems: list[str] = field(default_factory=list)
    _endings: dict[str, str] = field(default_factory=dict)

    def grammar(self, root: str) -> str:
        return f"root ::= {root}\n" + "".join(f"{name} ::= {rule}\n" for name, rule in self.rules.items())

    def add(self, kind: str, rule: str) -> str:
        name = f"{kind}-{len(self.rules)}"
        self.rules[name] = rule
        return name

    def problem(self, tool: Tool, problem: str) -> str:
        self.problems.append(f"tool {tool.name}: parameters, {problem}")
        return '""'

    def keeps(self, tool: Tool) -> bool:
        return self.keeps_all or tool.strict

    def arguments(self, tool: Tool, converter: type[Converter] = Converter) -> str:
        """The rule for a tool's arguments as an object. Without properties they are {}."""
        if not self.keeps(tool):
            return self.schema(tool, {"type": "object"}, "", converter)
        closed = {} if tool.parameters.get("properties") else {"additionalProperties": False}
        return self.schema(tool, {**closed, **tool.parameters}, "", converter)

    def schema(self, tool: Tool, schema: Any, at: str, converter: type[Converter] = Converter) -> str:
        """The rule for a value that fits a schema."""
        text = json.dumps(schema)
        if found := problems_of(text, converter):
            for problem in found:
                self.problem(tool, f"{problem} of {at}" if at else problem)
            return '""'
        return self.included(grammar_of(text, converter), "" if converter is Converter else "quoted-")

    def included(self, grammar: str, shared: str = "") -> str:
        """The root rule of a schema's grammar, whose own rules come under other names.

        Args:
            shared: before the names of the rules that all such grammars share.
        """
        prefix = f"schema-{len(self.rules)}-"

        def renamed(name: str) -> str:
            return prefix + name if name == "root" or re.fullmatch(r"r\d+", name) else shared + name

        for line in grammar.splitlines():
            name, _, rule = line.partition(" ::= ")
            self.rules[renamed(name)] = _WORDS.sub(
                lambda found: found[0] if found[0][0] in '"[' else renamed(found[0]), rule
            )
        return renamed("root")

    def text_before(self, end: str) -> str:
        """The rule for text that does not hold `end`."""
        if end not in self._endings:
            kind = f"text-{len(self.rules)}"
            self.rules.update(rules_without(end, lambda state: f"{kind}-{state}"))
            self._endings[end] = f"{kind}-0"
        return self._endings[end]
