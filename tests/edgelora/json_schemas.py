"""JSON schemas for tests, and a validator of the keywords they use, written from the standard and not from the code."""

from __future__ import annotations

import re
from datetime import date
from typing import Any
from uuid import UUID

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", 'q"\\\n', None, 1.5]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "numbers": {
        "type": "array",
        "prefixItems": [
            {"type": "integer", "minimum": -12, "maximum": 107},
            {"type": "number", "minimum": -3, "maximum": 21},
            {"type": "integer", "exclusiveMinimum": 0},
            {"type": "integer", "exclusiveMaximum": -5, "minimum": -1000},
            {"type": "number", "maximum": -2},
        ],
        "items": False,
    },
    "counts": {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 2, "maxItems": 5},
    "tuple": {
        "type": "array",
        "prefixItems": [{"const": "a"}],
        "items": {"type": "null"},
        "minItems": 3,
        "maxItems": 4,
    },
    "optional": {"type": "object", "properties": {name: {"const": name} for name in "abcd"}, "required": ["c"]},
    "others": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "ab": {"type": "null"}, "b": {"type": "null"}},
        "required": ["ab"],
        "additionalProperties": {"type": "boolean"},
    },
    "formats": {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}},
        "required": ["day", "id", "more"],
        "additionalProperties": {"type": "boolean"},
    },
    "patterns": {
        "type": "array",
        "prefixItems": [
            {"type": "string", "pattern": r"^[A-Z]{2}-\d+$"},
            {"type": "string", "pattern": r'^[^a-z]{3}"?$'},
        ],
        "items": False,
    },
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "child": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "child"],
            }
        },
        "$ref": "#/$defs/node",
    },
    "shapes": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": kind}, "x": {"type": "boolean"}}, "required": ["kind"]}
            for kind in ("circle", "square")
        ]
    },
}


def breaks(value: Any, schema: Any, root: Any = None) -> str:
    """Why a value does not fit a schema; empty if it does."""
    root = schema if root is None else root
    if schema is False:
        return f"{value!r} where nothing may be"
    if schema is True:
        return ""
    if "$ref" in schema:
        target = root
        for part in schema["$ref"].split("/")[1:]:
            target = target[part]
        return breaks(value, target, root)
    for keyword, fewest, most in (("anyOf", 1, 99), ("oneOf", 1, 1)):
        if keyword in schema:
            fits = sum(not breaks(value, each, root) for each in schema[keyword])
            return "" if fewest <= fits <= most else f"{value!r} fits {fits} of {keyword}"
    if "const" in schema or "enum" in schema:
        wanted = [schema["const"]] if "const" in schema else schema["enum"]
        return "" if any(value == each and type(value) is type(each) for each in wanted) else f"{value!r}: {wanted}"
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if _type(value) not in types and not ("number" in types and _type(value) == "integer"):
        return f"{value!r} is not {types}"
    check = {dict: _object, list: _array, str: _string, int: _number, float: _number}.get(type(value))
    return check(value, schema, root) if check else ""


def _type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    return names.get(type(value), "null")


def _object(value: dict[str, Any], schema: Any, root: Any) -> str:
    if missing := set(schema.get("required", ())) - set(value):
        return f"{missing} missing"
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return next(filter(None, (breaks(part, known.get(key, others), root) for key, part in value.items())), "")


def _array(value: list[Any], schema: Any, root: Any) -> str:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9):
        return f"{len(value)} items"
    first = schema.get("prefixItems", [])
    parts = [*first, *[schema.get("items", True)] * len(value)]
    return next(filter(None, (breaks(item, part, root) for item, part in zip(value, parts, strict=False))), "")


def _string(value: str, schema: Any, _root: Any) -> str:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9):
        return f"{value!r} has {len(value)} characters"
    readers = {"date": date.fromisoformat, "uuid": UUID}
    try:
        readers.get(schema.get("format"), str)(value)  # type: ignore[operator]
    except ValueError:
        return f"{value!r} is no {schema['format']}"
    return "" if re.search(schema.get("pattern", ""), value) else f"{value!r} does not match"


def _number(value: float, schema: Any, _root: Any) -> str:
    fits = (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and value > schema.get("exclusiveMinimum", float("-inf"))
        and value < schema.get("exclusiveMaximum", float("inf"))
    )
    return "" if fits else f"{value} is out of bounds"
