"""A chat completion's request in OpenAI's fields, read as edgelora's own; what cannot be followed is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.errors import SettingsError
from edgelora.sampling import Sampling

# Fields that change nothing here, and those that must have one of these values, since nothing else is done.
_WITHOUT_MEANING = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
_RENAMED = {"max_completion_tokens": "max_tokens", "model": "adapter"}


def plain_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion's request as a plain row.

    Raises:
        SettingsError: a field, or a value of it, that cannot be followed here.
    """
    settings = Sampling.field_names()
    fields, problems = dict[str, Any](), list[str]()
    for name, value in body.items():
        renamed = _RENAMED.get(name, name)
        if value is None or name in _WITHOUT_MEANING:
            continue
        if name == "messages":
            fields[name] = [_message(message) for message in value] if isinstance(value, list) else value
        elif name == "response_format" and "schema" in settings and (schema := _schema(value)) is not None:
            fields["schema"] = schema
        elif name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                wanted = " or ".join(map(repr, _NEUTRAL[name]))
                problems.append(f"{name} is {value!r}, only {wanted} can be followed here")
        elif renamed == "adapter" or renamed in settings or renamed == "scale":
            fields[renamed] = value
        else:
            problems.append(f"unknown field {name}")
    if problems:
        raise SettingsError("body: " + "; ".join(problems))
    return fields


def _message(message: Any) -> Any:
    """A message with text parts joined, and the developer's as the system's, which is its older name."""
    if not isinstance(message, Mapping):
        return message
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _schema(response_format: Any) -> Any:
    """The JSON schema of a `response_format`, None where it has none."""
    if not isinstance(response_format, Mapping) or response_format.get("type") != "json_schema":
        return None
    described = response_format.get("json_schema")
    return described.get("schema") if isinstance(described, Mapping) else None
