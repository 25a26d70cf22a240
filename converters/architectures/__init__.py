"""The model families that convert, found by the name in `config.json` or in a GGUF file.

To add a family: one file beside this one that ends in `FAMILY = Family(...)`, and its row in `FAMILIES` and
`MODEL_TYPES`. A model that is another family under its own name needs only the rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from converters.architectures import llama
from converters.architectures.family import Config, Dimensions, Family, Place, Row
from converters.errors import FormatError, UnsupportedArchitectureError

__all__ = ["FAMILIES", "Config", "Dimensions", "Family", "Place", "Row", "find_family", "find_gguf_family"]

# transformers class to family
FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": llama.FAMILY,
}
# transformers class to the model_type that goes with it
MODEL_TYPES: Mapping[str, str] = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}


def find_family(config: Config, folder: Path) -> Family:
    """The family of a Hugging Face configuration.

    Raises:
        FormatError: `architectures` is missing, or `model_type` contradicts it.
        UnsupportedArchitectureError: a family that is not in the table; the hint names the nearest one.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise FormatError(f"{folder / 'config.json'}: architectures is {names!r}, expected a list with one name")
    if names[0] not in FAMILIES:
        raise _unknown(names[0], str(folder), list(FAMILIES))
    wanted, model_type = MODEL_TYPES[names[0]], config.get("model_type", MODEL_TYPES[names[0]])
    if model_type != wanted:
        raise FormatError(
            f"{folder / 'config.json'}: architectures says {names[0]} (model_type {wanted!r}), "
            f"model_type is {model_type!r}",
            hint="transformers builds the model of model_type: correct the one that is wrong.",
        )
    return FAMILIES[names[0]]


def find_gguf_family(architecture: str, source: Path) -> Family:
    """The family of a GGUF file.

    Raises:
        UnsupportedArchitectureError: a family that is not in the table.
    """
    by_name = {family.architecture: family for family in FAMILIES.values()}
    if architecture not in by_name:
        raise _unknown(architecture, str(source), list(by_name))
    return by_name[architecture]


def _unknown(name: str, source: str, known: list[str]) -> UnsupportedArchitectureError:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return UnsupportedArchitectureError(
        f"{source}: unknown architecture {name!r} (known: {', '.join(known)}; the nearest is {nearest})",
        hint="To add it, write a file in converters/architectures/, or an alias row in its __init__.py.",
    )
