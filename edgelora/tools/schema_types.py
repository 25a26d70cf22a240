"""What types of values a JSON schema allows, as far as that is plain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.json_grammar import TYPES, is_a


def types_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str] | None:
    """The types that a schema allows; None where it may be any.

    Args:
        root: the schema that its `$ref` point into.
    """
    if not isinstance(schema, Mapping) or depth > 8:
        return None
    if "$ref" in schema:
        return types_of(_target(root, schema["$ref"]), root, depth + 1)
    for combiner in ("anyOf", "oneOf"):
        if isinstance(each := schema.get(combiner), list):
            found = [types_of(one, root, depth + 1) for one in each]
            return None if None in found else frozenset[str]().union(*(types or () for types in found))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return frozenset(name for name in TYPES for value in values if is_a(value, name))
    wanted = schema.get("type")
    names = [wanted] if isinstance(wanted, str) else wanted
    return frozenset(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _target(root: Any, reference: Any) -> Any:
    found = root
    for part in str(reference).split("/")[1:]:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found
