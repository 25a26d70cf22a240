"""What /openapi.json says of request bodies: the fields, their types and bounds. `bodies` has the last word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEXT: dict[str, Any] = {"type": "string"}
_FLAG: dict[str, Any] = {"type": "boolean"}


def _number(low: float, high: float) -> dict[str, Any]:
    return {"type": "number", "minimum": low, "maximum": high}


def _whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def _list(items: Mapping[str, Any], least: int = 0, most: int = 64) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": list(required)}


_MODEL = {"type": "string", "description": "An adapter's name, base, or base:NAME.", "examples": ["base"]}
_FUNCTION = _object(
    {"name": _TEXT, "description": _TEXT, "parameters": {"type": "object"}, "strict": {"type": "boolean"}}, "name"
)
_CALL = _object({"id": _TEXT, "type": {"const": "function"}, "function": _object({"name": _TEXT, "arguments": _TEXT})})
_MESSAGE = {
    **_object(
        {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [_TEXT, {"type": "null"}, _list(_object({"type": {"const": "text"}, "text": _TEXT}))]},
            "tool_calls": _list(_CALL),
            "tool_call_id": _TEXT,
        },
        "role",
    ),
    "examples": [{"role": "user", "content": "Is it waterproof?"}],
}
_COMMON = {
    "model": _MODEL,
    "temperature": _number(0, 2),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": _whole(0, 1000),
    "min_p": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    "repeat_penalty": _number(0.1, 10),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": _whole(0, 2**32 - 1),
    "stop": {"anyOf": [_TEXT, _list(_TEXT, 0, 4)]},
    "n": _whole(1, 4),
    "stream": _FLAG,
    "stream_options": _object({"include_usage": _FLAG}),
    "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
    "user": _TEXT,
    "timeout": {**_number(0.1, 600), "description": "Seconds that the reply may take."},
    "lora_scale": {**_number(-100, 100), "description": "Instead of the adapter's own scale."},
    "adapters": {
        "type": "object",
        "additionalProperties": _number(-100, 100),
        "description": "A blend: adapters by name, each with its scale.",
    },
    "grammar": {**_TEXT, "description": "GBNF, llama.cpp's notation, that the reply follows."},
}
CHAT = _object(
    {
        **_COMMON,
        "messages": _list(_MESSAGE, 1),
        "max_completion_tokens": _whole(1, 4096),
        "max_tokens": _whole(1, 4096),
        "logprobs": _FLAG,
        "top_logprobs": _whole(0, 20),
        "response_format": {
            "anyOf": [
                _object({"type": {"enum": ["text", "json_object"]}}, "type"),
                _object(
                    {
                        "type": {"const": "json_schema"},
                        "json_schema": _object({"schema": {"type": "object"}}, "schema"),
                    },
                    "type",
                    "json_schema",
                ),
            ]
        },
        "tools": _list(_object({"type": {"const": "function"}, "function": _FUNCTION}, "type", "function"), 0, 8),
        "tool_choice": {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                _object(
                    {"type": {"const": "function"}, "function": _object({"name": _TEXT}, "name")}, "type", "function"
                ),
            ]
        },
        "parallel_tool_calls": _FLAG,
    },
    "model",
    "messages",
)
COMPLETION = _object(
    {
        **_COMMON,
        "prompt": {"anyOf": [_TEXT, _list(_TEXT, 1, 4), _list(_whole(0, 1000), 1)]},
        "max_tokens": _whole(1, 4096),
        "logprobs": _whole(0, 20),
        "echo": _FLAG,
    },
    "model",
    "prompt",
)
EMBEDDINGS = _object(
    {
        "model": _MODEL,
        "input": {"anyOf": [_TEXT, _list(_TEXT, 1, 4), _list(_whole(0, 1000), 1)]},
        "encoding_format": {"enum": ["float", "base64"]},
    },
    "model",
    "input",
)
_GENERATION = {**_whole(0, 2**53), "description": "Only if the name is at this generation now; 0 for a new name."}
LOAD = _object(
    {
        "lora_name": _TEXT,
        "lora_path": {**_TEXT, "description": "A GGUF file in the server's adapter folder."},
        "scale": _number(-100, 100),
        "load_inplace": {**_FLAG, "description": "Replace the adapter of that name."},
        "if_generation": _GENERATION,
    },
    "lora_name",
    "lora_path",
)
UNLOAD = _object({"lora_name": _TEXT, "if_generation": _GENERATION}, "lora_name")


def body(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON body, as FastAPI's `openapi_extra` takes it."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": dict(schema)}}}}


_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
FILE: dict[str, Any] = {"requestBody": {"required": True, "content": _BINARY}}
