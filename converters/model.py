"""A model folder understood: which family it is, its sizes and vocabulary, and where each of its tensors goes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from converters.architectures import Dimensions, Family, Place, find_family
from converters.checkpoint import READABLE, Checkpoint, Floats
from converters.errors import FormatError, UnsupportedError, listed
from converters.hub_cache import repository_of
from converters.tokenizer import Vocabulary, load_vocabulary
from converters.writer import Typed, Value

# gguf's remarks about model cards and post-processors go to whoever configured logging, not to the terminal.
for _logger in ("gguf", "metadata"):
    logging.getLogger(_logger).addHandler(logging.NullHandler())

EMBEDDING = "model.embed_tokens.weight"
COMPARED_BYTES = 4 << 20
F32_MAX = 3.4e38
UNTIED = (
    "config.json ties the output to the embeddings, but lm_head.weight differs from them: it is kept as an output of "
    "its own, as transformers does"
)


@dataclass(frozen=True)
class Model:
    """A checkpoint understood: its family, sizes, vocabulary, and where each tensor goes."""

    family: Family
    dimensions: Dimensions
    hyperparameters: Mapping[str, Any]
    vocabulary: Vocabulary
    places: Mapping[str, Place]
    notices: tuple[str, ...]


def understand(checkpoint: Checkpoint) -> Model:
    """Match a model folder with its family; every problem is in one message.

    Raises:
        UnsupportedError: configuration or tensors that this family cannot take.
        FormatError: tensors that are missing or have a shape that config.json contradicts.
    """
    config, folder = checkpoint.config, checkpoint.folder
    family = find_family(config, folder)
    if problems := family.problems(config):
        raise UnsupportedError(f"{folder / 'config.json'}: cannot be converted exactly:{listed(problems)}")
    hyperparameters = family.hyperparameters(config)
    named = {"general.architecture": family.architecture, **hyperparameters}
    dimensions = Dimensions.from_metadata(named, config["vocab_size"])
    places = _places(checkpoint, family, dimensions)
    vocabulary = load_vocabulary(folder, config["vocab_size"])
    untied = config.get("tie_word_embeddings") and any(place.row.absent_if_tied for place in places.values())
    notices = (*family.notices(config), *([UNTIED] if untied else []), *vocabulary.notices)
    return Model(family, dimensions, hyperparameters, vocabulary, places, notices)


def _places(checkpoint: Checkpoint, family: Family, dimensions: Dimensions) -> dict[str, Place]:
    """GGUF name to place, for every tensor of the checkpoint that is written."""
    config = checkpoint.config
    places = {place.hf_name: place for place in family.places(dimensions, config)}
    unread = _unread(checkpoint, places)
    expected = {name: place for name, place in places.items() if name not in unread}
    found, problems = {}, []
    for name, tensor in checkpoint.tensors.items():
        place = expected.get(name)
        if place is None:
            if not name.endswith(family.ignored) and name not in unread:
                problems.append(f"{name}: no tensor of a {family.architecture} model with this config.json")
            continue
        shape = place.row.shape_of(place.suffix, dimensions)
        if tensor.shape != shape:
            problems.append(f"{name}: has shape {tensor.shape}, config.json gives {shape}")
        found[place.gguf_name] = place
    problems += [f"{name}: is missing" for name, place in expected.items() if place.gguf_name not in found]
    if problems:
        raise FormatError(f"{checkpoint.folder}: its tensors do not fit its config.json:{listed(problems)}")
    return found


def _unread(checkpoint: Checkpoint, places: Mapping[str, Place]) -> list[str]:
    """The outputs that tied embeddings stand for: those that are absent, or copies of them bit by bit.

    An output that differs is a weight of its own, whatever config.json says: transformers does not tie it either
    (`tie_weights`, modeling_utils.py).
    """
    if not checkpoint.config.get("tie_word_embeddings"):
        return []
    outputs = [name for name, place in places.items() if place.row.absent_if_tied]
    return [name for name in outputs if name not in checkpoint.tensors or _is_copy(checkpoint, name, EMBEDDING)]


def _is_copy(checkpoint: Checkpoint, name: str, other: str) -> bool:
    one, two = checkpoint.tensors[name], checkpoint.tensors.get(other)
    if two is None or one.shape != two.shape or one.dtype not in READABLE or two.dtype not in READABLE:
        return two is None  # the embedding is missed by its own name
    rows = one.shape[0] if one.shape else 0
    step = max(1, COMPARED_BYTES // (4 * max(1, one.shape[-1] if one.shape else 1)))
    return all(
        np.array_equal(
            checkpoint.rows(name, start, min(rows, start + step)).view(np.uint32),
            checkpoint.rows(other, start, min(rows, start + step)).view(np.uint32),
        )
        for start in range(0, rows, step)
    )


def norms(checkpoint: Checkpoint, places: Mapping[str, Place]) -> Iterator[tuple[str, Floats]]:
    """GGUF name and values of every norm vector."""
    for name, place in places.items():
        if name.endswith("_norm.weight"):
            yield name, checkpoint.rows(place.hf_name)[0]


def describe(folder: Path, architecture: str, n_parameters: int) -> dict[str, Value]:
    """The `general.*` keys from model card, generation_config.json and folder name, as llama.cpp's converter."""
    folder = folder.resolve()
    try:
        card = gguf.Metadata.load(None, folder, None, n_parameters)
    except Exception as error:  # gguf and its YAML parser raise anything
        raise FormatError(f"{folder}: README.md or generation_config.json cannot be understood ({error})") from None
    card.name = card.name or folder.name
    if (repository := repository_of(folder)) and card.name == gguf.Metadata.id_to_title(folder.name):
        card.name = repository.rpartition("/")[2]
    card.size_label = card.size_label or gguf.size_label(n_parameters, n_parameters, 0, 0)
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("model")
    card.set_gguf_meta_model(writer)
    return {key: _typed(folder, key, pair) for key, pair in writer.kv_data[0].items()}


def _typed(folder: Path, key: str, pair: Any) -> Value:
    """gguf's value, checked: it takes whatever the model card and generation_config.json say."""
    kinds: dict[str, Any] = {"INT32": int, "UINT32": int, "FLOAT32": (int, float), "STRING": str, "ARRAY": list}
    value, wanted = pair.value, kinds[pair.type.name]
    largest = 2**31 - 1 if wanted is int else F32_MAX
    is_number = isinstance(value, (int, float))
    if not isinstance(value, wanted) or isinstance(value, bool) or (is_number and not abs(value) <= largest):
        raise FormatError(f"{folder}: {key} is {value!r} in its README.md or generation_config.json")
    if pair.type.name == "INT32":
        return Typed("i", value)
    return float(value) if pair.type.name == "FLOAT32" else value
