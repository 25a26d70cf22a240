"""What JSON calls the types of values, for messages about them."""

from __future__ import annotations


def json_type(value: object) -> str:
    """`"list"` for `[1, 2]`; for what JSON does not have, Python's own name."""
    names = {
        dict: "object",
        list: "list",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
