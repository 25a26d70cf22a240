"""Where a reply ends, and which chat template there is, when a model folder says more than a GGUF file can hold.

Several ids may end a reply (`eos_token_id: [128001, 128009]`); llama.cpp's converter writes the one that
tokenizer_config.json names. The others go into a key of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.checkpoint import read_json
from converters.errors import FormatError
from converters.special_tokens import ID_KEYS, TEMPLATE
from converters.writer import Value

ENDS = "edgelora.end_token_ids"


def end_tokens(folder: Path, metadata: Mapping[str, Value], n_vocab: int) -> dict[str, Value]:
    """The keys to add for the ids that end a reply.

    Args:
        metadata: with the eos of tokenizer_config.json, which goes before those of the other files. Without one, the
            first of the others takes its place: llama.cpp would take id 2 or 11 for it.

    Raises:
        FormatError: an id that is not one.
    """
    ids = [number for name in ("generation_config.json", "config.json") for number in _eos_ids(folder / name, n_vocab)]
    taken = {metadata.get(ID_KEYS["eos"]), metadata.get(ID_KEYS["eot"])} - {None}
    left = [number for number in dict.fromkeys(ids) if number not in taken]
    found: dict[str, Value] = {}
    if left and ID_KEYS["eos"] not in metadata:
        found[ID_KEYS["eos"]] = left.pop(0)
    return {**found, ENDS: left} if left else found


def _eos_ids(path: Path, n_vocab: int) -> list[int]:
    given = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if bad := [number for number in ids if type(number) is not int or not 0 <= number < n_vocab]:
        raise FormatError(f"{path}: eos_token_id has {bad[0]!r}, expected ids below {n_vocab}")
    return ids


def lost_templates(folder: Path, metadata: Mapping[str, Value]) -> list[str]:
    """A notice where there are chat templates, but none under the name "default"."""
    path = folder / "tokenizer_config.json"
    templates: Any = read_json(path).get("chat_template") if path.is_file() else None
    if TEMPLATE in metadata or not isinstance(templates, list):
        return []
    names = [str(template.get("name")) for template in templates if isinstance(template, Mapping)]
    return [
        f"chat_template: none is named 'default' (there is {', '.join(names) or 'none'}), so the file has no default"
    ]
