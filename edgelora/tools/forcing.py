"""Grammars of replies that call tools: those that have to, those that may, and those that are JSON otherwise.

The beginning that all calls share which a reply has to make goes into the prompt (`Forced.opening`). What ends a call
may be left out where nothing follows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgelora import gbnf
from edgelora.errors import SettingsError
from edgelora.json_grammar import grammar_of
from edgelora.tools.call_rules import Rules, call_rules
from edgelora.tools.calls import Family, JsonCalls
from edgelora.tools.channel_calls import THOUGHTS, ChannelCalls
from edgelora.tools.definitions import Choice, Tools
from edgelora.tools.free_text import literal

_SPACES = "".join(chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace())


@dataclass(frozen=True)
class Forced:
    """Attributes:
    opening: text at the end of the prompt.
    grammar: GBNF of what follows.
    """

    opening: str
    grammar: str


def forced(choice: Choice, tools: Tools, family: Family, *, parallel: bool = True) -> Forced:
    """What makes a reply a call as `choice` wants it ("required" or "named"), with arguments that fit its schema.

    Args:
        parallel: whether it may be several calls; of a tool chosen by its name it is one.

    Raises:
        SettingsError: a schema cannot be kept by a grammar; each problem with its tool and its place.
    """
    candidates = [tools[choice.name]] if choice.kind == "named" else list(tools.values())
    made = Rules(keeps_all=True)
    many = parallel and choice.kind == "required"
    rules = call_rules(family, candidates, made, many=many)
    close = rules.close
    if many and rules.again:
        close = f"{close} (line {rules.whole})*"
    if rules.close and rules.ends_itself:
        close = f"({close})?"
    if isinstance(family, JsonCalls) and family.bare:
        return Forced("", _checked(made, rules.body, "tool_choice"))
    return Forced(rules.opening + rules.shared, _checked(made, f"{rules.body} {close}", "tool_choice"))


def strict_calls(tools: Tools, family: Family, *, parallel: bool = True) -> str:
    """The grammar of a reply that is free, but that calls of strict tools in it have arguments that fit.

    Raises:
        SettingsError: a strict tool's schema cannot be kept by a grammar.
    """
    made = Rules(keeps_all=False)
    rules = call_rules(family, list(tools.values()), made, many=parallel)
    if isinstance(family, ChannelCalls):
        final = f"{literal(f'<|channel|>final{family.header_end}')} {made.text_before(family.message_end)}"
        root = f"{_messages(family, made, (THOUGHTS, 'commentary'))} ({rules.whole} | {final})"
    elif isinstance(family, JsonCalls) and family.bare:
        root = f"{rules.body} | {_text_without_brace(family, made)} ({rules.whole})?"
    else:
        text = made.text_before(family.opening)
        root = f"{text} ({rules.whole} {text}){'*' if parallel else '?'}"
    return _checked(made, root, "strict")


def _text_without_brace(family: Family, made: Rules) -> str:
    """The rule for text that cannot be read as a call: it does not begin with an object, nor hold the opening."""
    text = made.text_before(family.opening)
    begun, first = text.removesuffix("0") + "1", literal(family.opening[0])
    others = "".join(f"\\U{ord(character):08X}" for character in f"{{{family.opening[0]}{_SPACES}")
    return made.add("text", f"[ \\n]* ({first} {begun} | [^{others}] {text})?")


def calls_or_json(tools: Tools, family: Family, schema: Mapping[str, Any], *, parallel: bool = True) -> str:
    """The grammar of a reply that is calls, or JSON that fits `schema`.

    Raises:
        SettingsError: calls cannot be told from JSON, or a strict tool's schema cannot be kept by a grammar.
    """
    if isinstance(family, JsonCalls) and family.bare:
        raise SettingsError(
            "tools and a schema for the reply are given, and this chat template's calls are JSON themselves",
            hint='Leave one of them out, or say "tool_choice": "none" or "required".',
        )
    made = Rules(keeps_all=False)
    rules = call_rules(family, list(tools.values()), made, many=parallel)
    calls = f"{rules.whole} (line {rules.whole})*" if parallel and rules.again else rules.whole
    answer = made.included(grammar_of(json.dumps(schema)))
    before = f"{literal(family.before_json)} " if family.before_json else ""
    thoughts = f"{_messages(family, made, (THOUGHTS,))} " if isinstance(family, ChannelCalls) else ""
    return _checked(made, f"{thoughts}({calls} | {before}{answer})", "response_format")


def _messages(family: ChannelCalls, made: Rules, channels: tuple[str, ...]) -> str:
    """The rule for any messages that come before the last, on some channels."""
    named = " | ".join(map(literal, channels))
    text, end = made.text_before(family.message_end), literal(f"{family.message_end}<|start|>assistant")
    return f"({literal('<|channel|>')} ({named}) {literal(family.header_end)} {text} {end})*"


def _checked(made: Rules, root: str, setting: str) -> str:
    text = made.grammar(root)
    if problems := made.problems or [f"as a grammar, {problem}" for problem in gbnf.problems(text)]:
        raise SettingsError(f"{setting}: " + "; ".join(problems), hint=_HINTS[setting])
    return text


_LEAVE_OUT = "Leave out of the parameters what is not supported"
_HINTS = {
    "tool_choice": f'{_LEAVE_OUT}, or let the model choose: "tool_choice": "auto".',
    "strict": f'{_LEAVE_OUT}, or "strict".',
    "response_format": f'{_LEAVE_OUT}, or "strict".',
}
