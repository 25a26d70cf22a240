"""Where the rows of a transformers tensor lie in a base's GGUF tensors.

    model.layers.0.self_attn.q_proj.weight   rows of blk.0.attn_q.weight in another order (llama)
    model.layers.0.self_attn.qkv_proj.weight attn_qkv, or the three of attn_q, attn_k and attn_v
    model.layers.0.mlp.experts.3.up_proj     a part of blk.0.ffn_up_exps.weight, or of blk.0.ffn_gate_up_exps.weight

The families' tables say it for files as llama.cpp's converter writes them; a file may also hold q, k and v in one
tensor, or gate and up of experts (`--fuse-qkv`, `--fuse-gate-up-exps` of convert_hf_to_gguf.py), or hold them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from converters.adapted_base import AdaptedBase
from converters.architectures import Family, Indices, Place
from converters.checkpoint import Floats
from converters.methods import LowRank, Turned
from converters.tensor_kinds import OUTPUT

# Tensors that a file may hold as one, by the row: the three parts of attention, and those of an expert's first half.
FUSED: Mapping[str, tuple[str, ...]] = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}


@dataclass(frozen=True)
class Slot:
    """Rows of one transformers tensor in one tensor of the file.

    Attributes:
        gguf: the file's tensor.
        rows: which of its rows; a stack's matrices follow one another.
        source: for each of them, the row of the transformers tensor, whose rows are outputs and follow one another
            likewise.
        columns: for each column of the file's, the column of the transformers tensor; None where they are the same.
        place: the row of the family's table.
    """

    gguf: str
    rows: Indices
    source: Indices
    columns: Indices | None
    place: Place

    @property
    def is_row(self) -> bool:
        """Whether it is a vector that lies as one row of a matrix: the norm of a head."""
        return bool(self.place.row.each) and len(self.place.row.stored_shape()) == 1


def find_slots(base: AdaptedBase, tensor: str) -> list[Slot]:
    """All places of a transformers tensor in a base; none where its family or the base has no such tensor."""
    found: dict[str, Slot] = {}
    for place, part in places_of(base.family, tensor):
        if place.layer is not None and place.layer >= base.sizes["layers"]:
            continue  # no layer of this base, and none whose sizes could be asked for
        if place.row.each and part >= base.sizes.at(place.layer)[place.row.each]:
            continue  # no expert of this base
        for slot in _slots(base, place, part):
            found[slot.gguf] = _joined(found[slot.gguf], slot) if slot.gguf in found else slot
    return list(found.values())


class Claims:
    """Which rows of a file's tensors an adapter changes, and by which name: one tensor may not have two."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._owners: dict[str, Indices] = {}

    def problem(self, tensor: str, slots: Iterable[Slot]) -> str:
        """Take the rows of a transformers tensor. "" where no other has them."""
        found = [other for slot in slots if (other := self._take(tensor, slot))]
        return f"{tensor}: is {found[0]} under another name" if found else ""

    def _take(self, tensor: str, slot: Slot) -> str:
        if not self._names or self._names[-1] != tensor:
            self._names.append(tensor)
        owners = self._owners.get(slot.gguf, np.zeros(0, np.int64))
        missing = int(slot.rows.max(initial=-1)) + 1 - len(owners)
        owners = np.pad(owners, (0, missing), constant_values=-1) if missing > 0 else owners
        self._owners[slot.gguf] = owners
        taken = owners[slot.rows]
        taken = taken[taken >= 0]
        before = {self._names[number] for number in np.unique(taken)} if taken.size else set()
        owners[slot.rows] = len(self._names) - 1
        return min(before - {tensor}, default="")


def _joined(one: Slot, other: Slot) -> Slot:
    """Both as one: gate and up of experts in one tensor here and there. The first, where they are the same rows."""
    if np.isin(other.rows, one.rows).any():
        return one
    rows, source = np.concatenate((one.rows, other.rows)), np.concatenate((one.source, other.source))
    order = np.argsort(rows)
    return replace(one, rows=rows[order], source=source[order])


def oriented(base: AdaptedBase, change: LowRank) -> LowRank:
    """A stack of matrices with its rows and columns as its base has them (`methods.parameters`)."""
    slots = find_slots(base, change.tensor) if change.turned is not Turned.NEVER else []
    if not slots:
        return change
    wanted = source_shape(base, slots[0])
    if wanted[-1] != wanted[-2]:
        return change if change.shape == wanted else _turned(change)
    is_straight = slots[0].place.row.transposed and change.turned is not Turned.ALWAYS
    return change if is_straight or change.turned is Turned.UNKNOWN else _turned(change)


def _turned(change: LowRank) -> LowRank:
    def load() -> tuple[Floats, Floats]:
        b, a = change.load()
        return np.ascontiguousarray(a.swapaxes(-1, -2)), np.ascontiguousarray(b.swapaxes(-1, -2))

    *stack, rows, columns = change.shape
    return replace(change, shape=(*stack, columns, rows), load=load)


def source_shape(base: AdaptedBase, slot: Slot) -> tuple[int, ...]:
    """The shape of the transformers tensor of a slot, rows first, a transposed one turned round."""
    shape = slot.place.hf_shape(base.sizes)
    return (*shape[:-2], shape[-1], shape[-2]) if slot.place.row.transposed and not slot.place.is_bias else shape


def shape_in_base(base: AdaptedBase, tensor: str) -> tuple[int, ...] | None:
    """Sizes of a transformers tensor, rows first; None where the base has none. A tied output has the embeddings'."""
    there = (slot for slot in find_slots(base, tensor) if slot.gguf in base.shapes or slot.gguf == OUTPUT)
    return next((source_shape(base, slot) for slot in there), None)


def factors_of(base: AdaptedBase, tensor: str) -> Floats | None:
    """What llama.cpp multiplies each matrix of a stack by, but not what an adapter adds to it; float32 (experts,).

    Args:
        tensor: the file's.
    """
    module = tensor.removesuffix(".weight")
    for row in base.family.rows:
        pattern = re.escape(row.gguf).replace(r"\{layer\}", r"\d+")
        if row.scaled_by and re.fullmatch(pattern, module) and module + row.scaled_by in base.shapes:
            return base.released.rows(module + row.scaled_by, 0, 1).reshape(-1)
    return None


def is_known(family: Family, tensor: str) -> bool:
    """Whether models of this family have such a tensor."""
    return any(True for _ in places_of(family, tensor))


def places_of(family: Family, tensor: str) -> Iterator[tuple[Place, int]]:
    """Rows of the table that a tensor belongs to, each with the tensor's number among those that it is made of."""
    name = family.module_name(tensor.replace("language_model.", ""))
    for row, expression, index in family.patterns:
        if match := expression.fullmatch(name):
            groups = match.groupdict()
            is_bias = row.ends[0] == ".weight" and name.endswith(".bias")
            layer = int(groups["layer"]) if groups.get("layer") else None
            yield Place(row, layer, is_bias), index if index >= 0 else int(groups["each"])


def _slots(base: AdaptedBase, place: Place, part: int) -> Iterator[Slot]:
    order, columns = place.row_order(base.sizes), place.column_order(base.sizes)
    each = _rows_of(place.hf_shape(base.sizes), place)
    if order is None:
        source = np.arange(each, dtype=np.int64)
        rows = source + part * each
    else:
        rows = np.flatnonzero((order >= part * each) & (order < (part + 1) * each))
        source = order[rows] - part * each
    for name, where, taken in _files_own(base, place, rows):
        yield Slot(name, where, source[taken], columns, place)


def _rows_of(shape: tuple[int, ...], place: Place) -> int:
    if len(shape) == 1:
        return 1 if place.row.each else shape[0]
    if place.row.transposed and not place.is_bias:
        return prod(shape[:-2]) * shape[-1]
    return prod(shape[:-1])


def _files_own(base: AdaptedBase, place: Place, rows: Indices) -> Iterator[tuple[str, Indices, Indices]]:
    """Tensors of the file for rows of a tensor of the table: (name, rows of it, which of `rows` those are).

    A fused weight has a fused bias, also where it has none yet: llama.cpp leaves out a bias of q without ones of k, v.
    Layers of linear attention have an `attn_qkv` that is no such thing: it is told by its size.
    """
    everything = np.arange(len(rows), dtype=np.int64)
    prefix, _, module = place.gguf_module.rpartition(".")
    ending = place.gguf_name.removeprefix(place.gguf_module)
    if place.gguf_name not in base.shapes:
        for fused, parts in FUSED.items():
            if module in parts and f"{prefix}.{fused}.weight" in base.shapes:
                sizes = [_matrix_rows(base, f"{prefix}.{name}", place) for name in parts]
                if sum(sizes) != base.shapes[f"{prefix}.{fused}.weight"][-2]:
                    return
                start, own = sum(sizes[: parts.index(module)]), sizes[parts.index(module)]
                yield f"{prefix}.{fused}{ending}", rows // own * sum(sizes) + start + rows % own, everything
                return
            if module == fused and all(f"{prefix}.{name}{ending}" in base.shapes for name in parts):
                if sum(base.shapes[f"{prefix}.{name}{ending}"][-2] for name in parts) == place.shape(base.sizes)[-2]:
                    yield from _split(base, prefix, ending, parts, rows)
                return
    known = base.shapes.get(place.gguf_name)
    is_made = known is None and (place.is_bias or place.gguf_module == "output")
    if is_made or (known and prod(known) == prod(place.shape(base.sizes))):
        yield place.gguf_name, rows, everything


def _matrix_rows(base: AdaptedBase, gguf_module: str, like: Place) -> int:
    """Rows of one matrix of a tensor of the table."""
    rows = (row for row in base.family.rows if Place(row, like.layer).gguf_module == gguf_module)
    return Place(next(rows), like.layer).shape(base.sizes)[-2]


def _split(
    base: AdaptedBase, prefix: str, ending: str, parts: tuple[str, ...], rows: Indices
) -> Iterator[tuple[str, Indices, Indices]]:
    """Rows of one tensor of the table over several of the file."""
    sizes = [base.shapes[f"{prefix}.{name}{ending}"][-2] for name in parts]
    row, start = rows % sum(sizes), 0
    for name, size in zip(parts, sizes, strict=True):
        inside = (row >= start) & (row < start + size)
        if inside.any():
            yield (
                f"{prefix}.{name}{ending}",
                rows[inside] // sum(sizes) * size + row[inside] - start,
                np.flatnonzero(inside),
            )
        start += size
