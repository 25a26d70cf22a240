"""The `tools` and `tool_choice` of a request, in OpenAI's fields, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgelora.errors import SettingsError

MAX_TOOLS = 128
"""As many as OpenAI takes."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: the JSON schema of its arguments, which is an object's.
        strict: its arguments fit the schema in every call.
        definition: {"type": "function", "function": {"name", "description", "parameters"}}, as chat templates take it.
    """

    name: str
    parameters: Mapping[str, Any]
    definition: Mapping[str, Any]
    strict: bool = False


Tools = Mapping[str, Tool]
"""By their names, in the order of the request."""


@dataclass(frozen=True)
class Choice:
    """What the reply is to be: text ("none"), either ("auto"), a call ("required"), or a call of `name` ("named")."""

    kind: Literal["none", "auto", "required", "named"]
    name: str = ""


def checked_tools(value: object) -> Tools:
    """The tools of a request; None and [] are none.

    Raises:
        SettingsError: they are not OpenAI's `tools`; every problem in one message.
    """
    if value is None:
        return {}
    if not isinstance(value, list | tuple):
        raise SettingsError(f"tools are {value!r}, expected a list")
    if len(value) > MAX_TOOLS:
        raise SettingsError(f"there are {len(value)} tools, at most {MAX_TOOLS} can be given")
    problems = [f"tool {number}: {found}" for number, tool in enumerate(value, start=1) for found in _problems(tool)]
    if not problems:
        names = [tool["function"]["name"] for tool in value]
        problems = [f"tool {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise SettingsError("tools: " + "; ".join(problems), hint=_HINT)
    return {tool.name: tool for tool in map(_tool, value)}


_HINT = 'A tool is {"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON schema}}.'


def _problems(tool: Any) -> Iterator[str]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        yield "it is no function"
        return
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        yield f"name is {name!r}, expected 1 to 64 letters, digits, _ and -"
    if not isinstance(function.get("description"), str | None):
        yield "description is no text"
    if not isinstance(function.get("strict"), bool | None):
        yield f"strict is {function['strict']!r}, expected true or false"
    if parameters is None:
        return
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        yield "parameters are no JSON schema of an object"
        return
    try:
        json.dumps(parameters, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        yield "parameters are no JSON"


def _tool(given: Mapping[str, Any]) -> Tool:
    function = given["function"]
    schema = {"type": "object", "properties": {}, **(function.get("parameters") or {})}
    described = {"description": function["description"]} if function.get("description") is not None else {}
    definition = {"type": "function", "function": {"name": function["name"], **described, "parameters": schema}}
    return Tool(function["name"], schema, definition, strict=function.get("strict") is True)


def checked_choice(value: object, tools: Tools) -> Choice:
    """The `tool_choice` of a request; None is "auto" where there are tools.

    Raises:
        SettingsError: it is none of OpenAI's, or asks for a tool that is not there.
    """
    match value:
        case None:
            return Choice("auto" if tools else "none")
        case "none" | "auto":
            return Choice(value)
        case "required" if tools:
            return Choice("required")
        case {"type": "function", "function": {"name": str(name)}} if name in tools:
            return Choice("named", name)
        case "required" | {"type": "function", "function": {"name": str()}}:
            known = f"the tools are {', '.join(tools)}" if tools else "there are no tools"
            raise SettingsError(f"tool_choice is {value!r}, and {known}")
    raise SettingsError(
        f"tool_choice is {value!r}, expected none, auto, required, or a function's name",
        hint='A function is chosen with {"type": "function", "function": {"name": ...}}.',
    )
