"""The tools of one request: what the template shows, what the reply must follow, and who reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgelora.template import ChatTemplate
from edgelora.tools.calls import Family
from edgelora.tools.definitions import Tools, checked_choice, checked_tools
from edgelora.tools.families import loses_calls, required_family
from edgelora.tools.forcing import calls_or_json, forced, strict_calls
from edgelora.tools.reading import Parser


@dataclass(frozen=True)
class ToolUse:
    """Attributes:
    tools: those of the request.
    opening: what the prompt ends with: the beginning of a call that the reply has to be.
    grammar: GBNF of the reply, or of the rest of that call; None where the reply is free.
    parallel: whether a reply may call more than once.
    either: the reply is calls or JSON, so that what looks like a call inside of the JSON is none.
    is_free: the grammar is of the calls' arguments alone, and the rest of the reply is the model's own.
    """

    tools: Tools
    family: Family
    opening: str = ""
    grammar: str | None = None
    parallel: bool = True
    either: bool = False
    is_free: bool = False

    @property
    def shown(self) -> list[Mapping[str, Any]]:
        """The tools as chat templates take them."""
        return [tool.definition for tool in self.tools.values()]

    @property
    def markers(self) -> frozenset[str]:
        """Texts that the parser has to see in the reply, also where they are control tokens, which give no text."""
        return self.family.markers

    def parser(self) -> Parser:
        """A fresh reader of one reply."""
        return Parser(self.family, self.tools, self.opening, either=self.either)


def tool_use(
    tools: object,
    choice: object,
    template: ChatTemplate,
    *,
    parallel: bool = True,
    schema: Mapping[str, Any] | None = None,
) -> ToolUse | None:
    """How a request's `tools` and `tool_choice` are followed; None where none are used.

    Args:
        parallel: whether a reply may call more than once, if the template can write such a reply into a conversation.
        schema: what a reply that does not call has to fit; a supported one.

    Raises:
        SettingsError: they make no sense, the template does not support tools, a tool's schema cannot be kept, or
            calls cannot be told from what fits `schema`.
    """
    checked = checked_tools(tools)
    chosen = checked_choice(choice, checked)
    if not checked or chosen.kind == "none":
        return None
    family = required_family(template)
    parallel = parallel and not loses_calls(template)
    if chosen.kind != "auto":
        must = forced(chosen, checked, family, parallel=parallel)
        return ToolUse(checked, family, must.opening, must.grammar, parallel)
    if schema is not None:
        grammar = calls_or_json(checked, family, schema, parallel=parallel)
        return ToolUse(checked, family, "", grammar, parallel, either=True)
    if not any(tool.strict for tool in checked.values()):
        return ToolUse(checked, family, parallel=parallel)
    return ToolUse(checked, family, "", strict_calls(checked, family, parallel=parallel), parallel, is_free=True)
