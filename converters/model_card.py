"""The `general.*` keys of a base: from its model card, generation_config.json and folder name.

As llama.cpp's converter (`prepare_metadata`, conversion/base.py), through gguf's own reading of model cards.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from converters.errors import FormatError
from converters.hub_cache import repository_of
from converters.writer import Typed, Value

# gguf, with its YAML and sentencepiece, is imported where a card is read: many adapters need none of it.
# Its remarks about model cards and post-processors go to whoever configured logging, not to the terminal.
for _logger in ("gguf", "metadata"):
    logging.getLogger(_logger).addHandler(logging.NullHandler())

F32_MAX = 3.4e38


def readable_name(path: Path) -> str:
    """The name of a file or folder as text that can be written down: names need not be UTF-8."""
    return path.resolve().name.encode("utf-8", "replace").decode("utf-8")


def describe(folder: Path, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Value]:
    """The keys.

    Args:
        shapes: of every tensor, by GGUF name: they give the size label ("7B", "8x7B").

    Raises:
        FormatError: a model card or generation_config.json that cannot be understood.
    """
    import gguf

    folder = folder.resolve()
    total, shared, expert, count = parameter_counts(shapes)
    try:
        card = gguf.Metadata.load(None, folder, None, total)
    except Exception as error:  # gguf and its YAML parser raise anything
        raise FormatError(f"{folder}: README.md or generation_config.json cannot be understood ({error})") from None
    card.name = card.name or folder.name
    if (repository := repository_of(folder)) and card.name == gguf.Metadata.id_to_title(folder.name):
        card.name = repository.rpartition("/")[2]
    card.size_label = card.size_label or gguf.size_label(total, shared, expert, count)
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("model")
    card.set_gguf_meta_model(writer)
    return {key: _typed(folder, key, pair) for key, pair in writer.kv_data[0].items()}


def parameter_counts(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """Parameters in all, those outside experts, those of one expert, and the number of experts.

    `get_total_parameter_count` in gguf/gguf_writer.py.
    """
    total = sum(prod(shape) for shape in shapes.values())
    stacks = [(name, shape) for name, shape in shapes.items() if "_exps." in name and len(shape) >= 3]
    counts = [shape[-2 if ".bias" in name else -3] for name, shape in stacks]
    stacked = [prod(shape) for _, shape in stacks]
    one = sum(size // count for size, count in zip(stacked, counts, strict=True))
    return total, total - sum(stacked), one, sum(counts) // len(counts) if counts else 0


def _typed(folder: Path, key: str, pair: Any) -> Value:
    """gguf's value, checked: it takes whatever the model card and generation_config.json say."""
    kinds: dict[str, Any] = {"INT32": int, "UINT32": int, "FLOAT32": (int, float), "STRING": str, "ARRAY": list}
    value, wanted = pair.value, kinds[pair.type.name]
    items = value if isinstance(value, list) else [value]
    largest = 2**31 - 1 if wanted is int else F32_MAX
    fits = isinstance(value, wanted) and len({*map(type, items)}) <= 1
    if not fits or not all(_is_plain(item, largest) for item in items):
        raise FormatError(
            f"{folder}: {key} is {repr(value)[:200]} in its README.md or generation_config.json",
            hint="Correct it there: a number among the words of a README.md has to be quoted.",
        )
    if pair.type.name == "INT32":
        return Typed("i", value)
    return float(value) if pair.type.name == "FLOAT32" else value


def _is_plain(value: Any, largest: float) -> bool:
    """Whether it is text that can be written down, or a number that a GGUF file holds."""
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= largest
