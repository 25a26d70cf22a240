"""A GGUF base's tensors as the checkpoint's they came from: the family's table, read the other way.

Rows go back to their places, stacks come apart, transposes are undone. What quantization took stays lost; values that a
norm was shifted by come back within a rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod

import numpy as np

from converters.architectures import Config, Family, Place, Sizes
from converters.checkpoint import Floats

Read = Callable[[str], Floats]
"""GGUF name to float32 values in the tensor's shape, in numpy order."""


def restored_places(family: Family, sizes: Sizes, config: Config, names: Iterable[str]) -> list[Place]:
    """Which row each tensor of a file goes back through: of several ways to store it, the first.

    Args:
        config: complete (`architectures.settings.complete`).
        names: of the file's tensors; computed ones have no place.
    """
    there: set[str] = set(names)
    found: dict[str, Place] = {}
    for place in family.places(sizes, config):
        if place.gguf_name in there and not place.row.mxfp4:
            found.setdefault(place.gguf_name, place)
    return list(found.values())


def restore(places: Iterable[Place], sizes: Sizes, read: Read) -> Iterator[tuple[str, Floats]]:
    """Every HF tensor that the places are made of, as float32 in its own shape; one group of them in memory at a time.

    Raises:
        ValueError: places that leave rows of a tensor unknown: a part of a fused matrix is not in the file.
    """
    groups: dict[tuple[str, ...], list[Place]] = {}
    for place in places:
        groups.setdefault(place.hf_names(sizes), []).append(place)
    for names, group in groups.items():
        yield from _restore_group(names, group, sizes, read)


def _restore_group(
    names: tuple[str, ...], group: list[Place], sizes: Sizes, read: Read
) -> Iterator[tuple[str, Floats]]:
    shape = group[0].hf_shape(sizes)
    is_transposed = group[0].row.transposed and not group[0].is_bias
    each = (*shape[:-2], shape[-1], shape[-2]) if is_transposed else shape
    if len(shape) == 1 and len(group[0].shape(sizes)) == 1:
        whole = np.full((len(names) * shape[0], 1), np.nan, np.float32)  # a vector's order is that of its values
    else:
        whole = np.full((len(names) * prod(each[:-1]), each[-1]), np.nan, np.float32)
    for place in group:
        _put(whole, place, sizes, read(place.gguf_name))
    if np.isnan(whole).any():
        raise ValueError(f"{names[0]}: the file has only a part of it")
    for name, part in zip(names, np.split(whole, len(names)), strict=True):
        matrix = part.reshape(each)
        yield name, np.ascontiguousarray(np.swapaxes(matrix, -1, -2)) if is_transposed else matrix


def _put(whole: Floats, place: Place, sizes: Sizes, values: Floats) -> None:
    """The rows of one GGUF tensor to their places among those of the HF tensors."""
    if place.row.value and not place.is_bias:
        values = place.row.value.back(values)
    rows = values.reshape(-1, 1) if whole.shape[1] == 1 and values.ndim == 1 else values.reshape(-1, values.shape[-1])
    order, columns = place.row_order(sizes), place.column_order(sizes)
    where = np.arange(len(rows)) if order is None else order
    if columns is None:
        whole[where] = rows
    else:
        whole[np.ix_(where, columns)] = rows
