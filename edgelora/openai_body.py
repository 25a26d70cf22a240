"""A chat completion's request in OpenAI's fields, read as edgelora's own; what cannot be followed is refused.

`plain_fields` reads the rows of a batch; the server's bodies (`edgelora.serve.bodies`) share the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgelora.errors import SettingsError
from edgelora.sampling import Sampling

# Fields that change nothing here, and those that must have one of these values, since nothing else is done.
WITHOUT_MEANING = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}
_RENAMED = {"max_completion_tokens": "max_tokens", "model": "adapter"}


def plain_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion's request as the fields of a plain row.

    Raises:
        SettingsError: fields, or values of them, that cannot be followed here; all of them in one message.
    """
    fields, problems = dict[str, Any](), list[str]()
    for name, value in body.items():
        if value is None or name in WITHOUT_MEANING:
            continue
        try:
            fields |= _field(name, value, body)
        except SettingsError as error:
            problems.append(error.message)
    if problems:
        raise SettingsError("body: " + "; ".join(problems))
    return fields


def _field(name: str, value: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    renamed = _RENAMED.get(name, name)
    if name in _READERS:
        return _READERS[name](value, body)
    if name in _ONLY:
        if value in _ONLY[name]:
            return {}
        wanted = " or ".join(map(repr, _ONLY[name]))
        raise SettingsError(f"{name} is {value!r}, only {wanted} can be followed here")
    if renamed in ("adapter", "scale", *Sampling.field_names()):
        return {renamed: value}
    raise SettingsError(f"unknown field {name}")


def _messages(value: Any, _body: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": [message_of(message) for message in value] if isinstance(value, list) else value}


def message_of(message: Any) -> Any:
    """A message with text parts joined, and the developer's as the system's, which is its older name; what is neither
    stays as it is."""
    if not isinstance(message, Mapping):
        return message
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _response_format(value: Any, _body: Mapping[str, Any]) -> dict[str, Any]:
    schema = schema_of(value)
    return {} if schema is None else {"schema": schema}


def schema_of(response_format: Any) -> Any:
    """The schema that a reply has to fit, None for text. Strict or not: a grammar keeps it.

    Raises:
        SettingsError: it is none of the formats that there are.
    """
    described = response_format if isinstance(response_format, Mapping) else {}
    inner = described.get("json_schema")
    match described.get("type"):
        case "text":
            return None
        case "json_object":
            return {}
        case "json_schema" if isinstance(inner, Mapping) and inner.get("schema") is not None:
            return inner["schema"]
    raise SettingsError(
        f"response_format is {response_format!r}, expected text, json_object, or json_schema with its schema"
    )


def _logprobs(value: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """`logprobs` says whether, `top_logprobs` how many candidates; the second makes no sense without the first."""
    if not isinstance(value, bool):
        raise SettingsError(f"logprobs is {value!r}, expected true or false")
    return {"logprobs": body.get("top_logprobs") or 0} if value else {}


def _top_logprobs(value: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    if value and body.get("logprobs") is not True:
        raise SettingsError(f"top_logprobs is {value!r} without logprobs")
    return {}


_READERS: Mapping[str, Callable[[Any, Mapping[str, Any]], dict[str, Any]]] = {
    "messages": _messages,
    "response_format": _response_format,
    "logprobs": _logprobs,
    "top_logprobs": _top_logprobs,
}
