"""The grammar of a reply that has to be a call of one of some tools, with arguments that fit its schema.

The beginning that all such calls share goes into the prompt (`Forced.opening`), where it becomes the control tokens
that it may stand for: a grammar sees text alone. What ends a call may be left out, for the same reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgelora import gbnf
from edgelora.errors import SettingsError
from edgelora.json_grammar import ANNOTATIONS, RULES, grammar_of, problems_of
from edgelora.tools.calls import Family, JsonCalls, NamedCalls, TaggedCalls
from edgelora.tools.definitions import Choice, Tool, Tools
from edgelora.tools.schema_types import types_of

_WORDS = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|(?<![A-Za-z0-9-])(?:root|r\d+)(?![A-Za-z0-9-])')
_LINE = 'line ::= "\\n"?\n'


@dataclass(frozen=True)
class Forced:
    """Attributes:
    opening: text at the end of the prompt.
    grammar: GBNF of what follows.
    """

    opening: str
    grammar: str


def forced(choice: Choice, tools: Tools, family: Family, *, parallel: bool = True) -> Forced:
    """What makes a reply a call as `choice` wants it ("required" or "named").

    Args:
        parallel: whether it may be several calls; of a tool chosen by its name it is one.

    Raises:
        SettingsError: a schema cannot be kept by a grammar; each problem with its tool and its place.
    """
    candidates = [tools[choice.name]] if choice.kind == "named" else list(tools.values())
    made = _Rules()
    many = parallel and choice.kind == "required"
    match family:
        case JsonCalls():
            opening, root = _json_calls(family, candidates, made, many)
        case NamedCalls():
            opening, root = _named_calls(family, candidates, made)
        case TaggedCalls():
            opening, root = _tagged_calls(family, candidates, made, many)
        case _:
            raise NotImplementedError(f"calls of {type(family).__name__}")
    text = f"root ::= {root}\n{_LINE}" + "".join(f"{name} ::= {rule}\n" for name, rule in made.rules.items())
    problems = made.problems or [f"as a grammar, {problem}" for problem in gbnf.problems(text)]
    if problems:
        raise SettingsError(
            "tool_choice: " + "; ".join(problems),
            hint='Leave out of the parameters what is not supported, or let the model choose: "tool_choice": "auto".',
        )
    return Forced(opening, text)


def _json_calls(family: JsonCalls, tools: Sequence[Tool], made: _Rules, many: bool) -> tuple[str, str]:
    calls = []
    for tool in tools:
        begin = f'{{"name": {json.dumps(tool.name)}, "{family.key}": '
        calls.append(f'{_literal(begin)} {made.arguments(tool)} "}}"')
    one = made.add("call", " | ".join(calls))
    if family.bare:
        return "", one
    close = f" (line {_literal(family.closing)})?" if family.closing else ""
    if family.in_list:
        more = f' ("," " "? {one})*' if many else ""
        return family.opening, f'line " "? "[" {one}{more} "]"{close}'
    if not family.closing:
        return family.opening, f"line {one}"
    again = f"line {_literal(family.opening)} line {one} line {_literal(family.closing)}"
    more = f" (line {_literal(family.closing)} ({again})*)?" if many else close
    return family.opening + "\n", f"{one}{more}"


def _named_calls(family: NamedCalls, tools: Sequence[Tool], made: _Rules) -> tuple[str, str]:
    close = f" (line {_literal(family.closing)})?" if family.closing else ""
    if len(tools) == 1:  # so that the separator, which may be a control token, is in the prompt too
        return f"{family.opening}{tools[0].name}{family.separator}", made.arguments(tools[0]) + close
    calls = [f"{_literal(tool.name + family.separator)} {made.arguments(tool)}" for tool in tools]
    return family.opening, f"({' | '.join(calls)}){close}"


def _tagged_calls(family: TaggedCalls, tools: Sequence[Tool], made: _Rules, many: bool) -> tuple[str, str]:
    before, behind, end = family.function
    last = f" {_literal(end)}" if end else ""
    calls = [
        f"{_literal(before + tool.name + behind)} line {_tagged_arguments(family, tool, made)}{last}" for tool in tools
    ]
    one = made.add("call", " | ".join(calls))
    close = f"line {_literal(family.closing)}"
    again = f"line {_literal(family.opening)} line {one} {close}"
    newline = "\n" if family.function[0] else ""  # without tags the name stands right behind the opening
    rest = f"{close} ({again})*" if many else close
    return family.opening + newline, f"{one} ({rest})?" if end else f"{one} {rest}"


def _tagged_arguments(family: TaggedCalls, tool: Tool, made: _Rules) -> str:
    """The rule for all arguments of a tool, in the order of its schema."""
    schema = tool.parameters
    unsupported = sorted(schema.keys() - ANNOTATIONS - {"type", "properties", "required", "additionalProperties"})
    properties, required = schema.get("properties"), schema.get("required", [])
    if unsupported or not isinstance(properties, Mapping) or not isinstance(required, list):
        what = ", ".join(unsupported) or "properties or required of another type"
        return made.problem(tool, f"unsupported {what} at #")
    if missing := [name for name in required if name not in properties]:
        return made.problem(tool, f"required but without a schema: {', '.join(map(str, missing))}")
    parts = []
    before, behind, value_before, value_behind = map(_literal, family.argument)
    for name, described in properties.items():
        if family.argument[1] in name or name != name.strip():
            return made.problem(tool, f"a name that tags cannot hold: {name!r}")
        value = _tagged_value(family, tool, name, described, made)
        lines = '"\\n"' if family.has_lines else '""'
        then = f"line {value_before}" if family.argument[2] else '""'
        pair = made.add(
            "pair", f"{before} {_literal(name)} {behind} {then} {lines} {value} {lines} {value_behind} line"
        )
        parts.append(pair if name in required else f"{pair}?")
    return made.add("arguments", " ".join(parts) or '""')


def _tagged_value(family: TaggedCalls, tool: Tool, name: str, schema: Any, made: _Rules) -> str:
    place, end = f"#/properties/{name}", family.argument[3]
    if not isinstance(schema, Mapping):
        return (
            made.text_before(end)
            if schema is True
            else made.problem(tool, f"no schema that a value can fit at {place}")
        )
    types = types_of(schema, tool.parameters)
    if types is not None and "string" not in types:
        whole = {**schema, **{key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}}
        return made.schema(tool, whole, place)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and all(_is_plain(value, end) for value in values):
        return made.add("value", " | ".join(map(_literal, values)))
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


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


@dataclass
class _Rules:
    """The rules of one grammar, and what kept some from being made."""

    rules: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, kind: str, rule: str) -> str:
        name = f"{kind}-{len(self.rules)}"
        self.rules[name] = rule
        return name

    def problem(self, tool: Tool, problem: str) -> str:
        self.problems.append(f"tool {tool.name}: parameters, {problem}")
        return '""'

    def arguments(self, tool: Tool) -> str:
        """The rule for a tool's arguments as JSON. Without properties they are {}."""
        closed = {} if tool.parameters.get("properties") else {"additionalProperties": False}
        return self.schema(tool, {**closed, **tool.parameters}, "")

    def schema(self, tool: Tool, schema: Mapping[str, Any], at: str) -> str:
        """The rule for JSON that fits a schema, whose own rules come under other names."""
        text = json.dumps(schema)
        if found := problems_of(text):
            for problem in found:
                self.problem(tool, problem if not at else f"{problem} of {at}")
            return '""'
        prefix = f"schema-{len(self.rules)}-"
        for line in grammar_of(text).splitlines():
            name, _, rule = line.partition(" ::= ")
            if name in RULES:
                self.rules[name] = rule
            else:
                self.rules[prefix + name] = _WORDS.sub(
                    lambda found: found[0] if found[0][0] in '"[' else prefix + found[0], rule
                )
        return f"{prefix}root"

    def text_before(self, end: str) -> str:
        """The rule for text that does not hold `end` (Knuth, Morris and Pratt's automaton)."""
        if "text-0" in self.rules:  # a family has one
            return "text-0"
        for state in range(len(end)):
            known = {character: _next_state(end, state, character) for character in dict.fromkeys(end)}
            known = {character: to for character, to in known.items() if to}
            ways = [f"{_literal(character)} text-{to}" for character, to in known.items() if to < len(end)]
            others = "".join(f"\\U{ord(character):08X}" for character in known)
            self.rules[f"text-{state}"] = " | ".join(['""', f"[^{others}] text-0", *ways])
        return "text-0"


def _next_state(text: str, state: int, character: str) -> int:
    """How much of `text` is there after `state` characters of it and one more."""
    seen = text[:state] + character
    return next(n for n in range(min(len(seen), len(text)), -1, -1) if seen.endswith(text[:n]))
