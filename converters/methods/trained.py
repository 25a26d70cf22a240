"""What PEFT saves beside a method's own tensors: modules trained as a whole, biases, norms, rows of the embeddings.

<module>.weight, <module>.bias                     modules_to_save, LayerNorm tuning, `bias="all"`
<module>.base_layer.weight                         a frozen copy of the base's, or embeddings that were resized
<module>.base_layer.bias                           the bias of a layer that the method wraps
<module>.token_adapter.trainable_tokens_delta      rows of an embedding (trainable_token_indices)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from converters.checkpoint import Floats, Tensors
from converters.methods.changes import Change, Replaced, Transformed
from converters.methods.method import PREFIX
from converters.peft_config import PeftConfig
from converters.peft_settings import short

WRAPPED = ".base_layer"
TOKENS = ("trainable_tokens_delta",)
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


def read_trained(
    config: PeftConfig, tensors: Tensors, names: Sequence[str], modules: frozenset[str]
) -> tuple[list[Change], list[str]]:
    """Changes and problems of the tensors that are no part of a module's method.

    Args:
        names: as stored.
        modules: those that the method changes.
    """
    changes: list[Change] = []
    problems = []
    for name in names:
        if not name.startswith(PREFIX):
            problems.append(f"{name}: no tensor of an adapter ({config.peft_type})")
        elif name.endswith("trainable_tokens_delta"):
            problems += _read_tokens(config, tensors, name, changes)
        else:
            problems += _read_whole(config, tensors, name, modules, changes)
    return changes, problems


def _read_whole(
    config: PeftConfig, tensors: Tensors, name: str, modules: frozenset[str], changes: list[Change]
) -> list[str]:
    module, _, ending = name.removeprefix(PREFIX).rpartition(".")
    if ending not in ("weight", "bias"):
        return [f"{name}: no tensor of an adapter ({config.peft_type})"]
    is_wrapped = module.endswith(WRAPPED)
    plain = module.removesuffix(WRAPPED)
    if is_wrapped and ending == "weight" and (plain not in modules or plain.rpartition(".")[2] not in EMBEDDINGS):
        return [f"{name}: a copy of a whole layer, which PEFT saves of embeddings only"]
    shape = tensors.tensors[name].shape
    if not shape or 0 in shape:
        return [f"{name}: has shape {shape}"]
    is_copy = is_wrapped and ending == "weight"
    changes.append(Replaced(f"{plain}.{ending}", shape, partial(_load, tensors, name), is_copy))
    return []


def _load(tensors: Tensors, name: str) -> Floats:
    return tensors.rows(name).reshape(tensors.tensors[name].shape)


def _read_tokens(config: PeftConfig, tensors: Tensors, name: str, changes: list[Change]) -> list[str]:
    module = name.removeprefix(PREFIX).removesuffix(".trainable_tokens_delta").removesuffix(".token_adapter")
    shape = tensors.tensors[name].shape
    indices = _token_indices(config.values, module)
    if not _is_ids(indices):
        return [f"{name}: {config.path.name} does not say which tokens these are ({short(indices)})"]
    if len(shape) != 2 or shape[0] != len(indices):
        return [f"{name}: has shape {shape} for {len(indices)} tokens"]
    where = np.asarray(indices, np.int64)
    changes.append(
        Transformed(
            f"{module}.weight", (None, shape[1]), lambda rows, start: _put(rows, start, where, _load(tensors, name))
        )
    )
    return []


def _token_indices(values: Mapping[str, Any], module: str) -> Any:
    """`trainable_token_indices` of LoRA (a list, or a list for each module); `token_indices` of TRAINABLE_TOKENS."""
    given = values.get("trainable_token_indices")
    given = values.get("token_indices") if given is None else given
    if isinstance(given, dict):
        return next((ids for key, ids in given.items() if module == key or module.endswith("." + key)), None)
    return given


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value)


def _put(rows: Floats, start: int, where: np.ndarray[Any, np.dtype[np.int64]], values: Floats) -> Floats:
    """`rows`, the first of which is row `start`, with those of `where` replaced."""
    inside = (where >= start) & (where < start + len(rows))
    changed = rows.copy()
    changed[where[inside] - start] = values[inside]
    return changed
