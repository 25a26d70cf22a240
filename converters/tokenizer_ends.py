"""Where a reply ends, and which chat template there is, when a model folder says more than a GGUF file can hold.

Several ids may end a reply (`eos_token_id: [128001, 128009]`); the file has room for two, eos and eot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.checkpoint import read_json
from converters.errors import FormatError
from converters.writer import Value

EOS, EOT, TEMPLATE = "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.chat_template"


def end_tokens(folder: Path, metadata: Mapping[str, Value], n_vocab: int) -> tuple[dict[str, Value], list[str]]:
    """The keys to add for the ids that end a reply, and a notice for those that find no place.

    Args:
        metadata: with the eos of tokenizer_config.json, which goes before those of the other files.

    Raises:
        FormatError: an id that is not one.
    """
    ids = [number for name in ("generation_config.json", "config.json") for number in _eos_ids(folder / name, n_vocab)]
    ids = list(dict.fromkeys(ids))
    found: dict[str, Value] = {}
    taken = {metadata.get(EOS), metadata.get(EOT)} - {None}
    left = [number for number in ids if number not in taken]
    for key in (EOS, EOT):
        if left and key not in metadata:
            found[key] = left.pop(0)
    lost = ", ".join(map(str, left))
    return found, [f"eos_token_id: a reply may end in {lost} too, for which a GGUF file has no place"] if left else []


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
