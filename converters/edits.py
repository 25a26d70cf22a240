"""An adapter's changes as edits of a base's GGUF tensors, in the order in which they happen.

by_tensor   blk.0.attn_q.weight   one adapter's, then the next one's
            output.weight         also what the embeddings share with a tied output, whether the file has one or not
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from converters.adapted_base import AdaptedBase, Tie
from converters.checkpoint import Floats
from converters.compile import INFINITE, is_base_copy, is_finite, misfit
from converters.methods import Change, LowRank, Reading, Replaced, Transformed
from converters.pairs import Pair, Piece, assemble, multiplied
from converters.placement import Claims, Slot, factors_of, find_slots, is_known, oriented
from converters.row_edits import Edit, edit_of, scaled, sum_of
from converters.tensor_kinds import EMBEDDING, OUTPUT
from converters.tied_output import UNKNOWN, for_output, is_embedding, is_output, keeps_tie, tie_for


@dataclass
class Edits:
    """What happens to a base.

    Attributes:
        by_tensor: GGUF name to its edits, in order.
        restored: those of them that are no change, but make the base what the adapter was trained on: other rows for
            another vocabulary.
        added: GGUF name to the shape of tensors that the base has not (biases); they begin as zeros.
        unties: the output becomes a tensor of its own: the embeddings change, or it does, and not both alike.
        problems: what cannot be merged.
    """

    by_tensor: dict[str, list[Edit]] = field(default_factory=dict)
    restored: dict[str, list[Edit]] = field(default_factory=dict)
    added: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unties: bool = False
    problems: list[str] = field(default_factory=list)

    def apply(self, name: str, rows: Floats, start: int) -> Floats:
        for edit in self.by_tensor.get(name, ()):
            rows = edit(rows, start)
        return rows


@dataclass
class _Growing:
    """The edits of one adapter, as they are found.

    Attributes:
        own: GGUF tensor and transformers tensor to the edits that are not low-rank.
        pieces: GGUF tensor to those that are.
    """

    base: AdaptedBase
    reading: Reading
    edits: Edits
    own: dict[tuple[str, str], list[Edit]] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    claims: Claims = field(default_factory=Claims)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what becomes infinite is refused by name
def edits_of(reading: Reading, base: AdaptedBase, scale: float = 1.0) -> Edits:
    """Every change of an adapter.

    Args:
        scale: of the whole adapter: W + scale * (changed W - W).
    """
    edits = Edits(problems=[*reading.problems, *reading.not_merged])
    growing = _Growing(base, reading, edits)
    for change in reading.changes:
        if isinstance(change, Replaced) and is_base_copy(base, change):
            continue
        change = oriented(base, change) if isinstance(change, LowRank) else change
        if not is_finite(change):
            edits.problems.append(f"{change.tensor}: {INFINITE}")
            continue
        for slots in _targets(growing, change):
            _edit(growing, change, slots)
    edits.by_tensor = {name: [*of_tensor] for name, of_tensor in edits.restored.items()}
    for (name, _), own in growing.own.items():
        edits.by_tensor.setdefault(name, []).extend(own if scale == 1.0 else [scaled(own, scale)])
    for name, pieces in growing.pieces.items():
        shape = base.shapes[EMBEDDING] if name == OUTPUT and base.is_tied else base.shapes[name]
        edits.by_tensor.setdefault(name, []).append(sum_of(assemble(name, shape, pieces), scale))
    return edits


def _edit(growing: _Growing, change: Change, slots: Sequence[Slot]) -> None:
    """A change in all of its places, after what the adapter has done there before."""
    if isinstance(change, LowRank):
        for slot in slots:
            growing.pieces.setdefault(slot.gguf, []).append(Piece(change, slot))
        return
    restored, own = growing.edits.restored, growing.own
    before = {s.gguf: [*restored.get(s.gguf, ()), *own.get((s.gguf, change.tensor), ())] for s in slots}
    base = edited_base(growing.base, Edits(before, added=growing.edits.added, unties=growing.edits.unties))
    is_restored = isinstance(change, Replaced) and change.is_copy
    for slot in slots:
        edits = restored.setdefault(slot.gguf, []) if is_restored else own.setdefault((slot.gguf, change.tensor), [])
        edits.append(edit_of(base, change, slot, slots))


def _targets(growing: _Growing, change: Change) -> list[list[Slot]]:
    """Where a change goes: once, or to the embeddings and to an output that follows them."""
    base, edits = growing.base, growing.edits
    tie = tie_for(base, change, growing.reading.changes)
    if tie is Tie.TIED and not is_embedding(base, change.tensor):
        return []  # of the output, which follows the embeddings
    slots = _slots(edits, base, change)
    problems = [UNKNOWN] if tie is Tie.UNKNOWN else []
    if isinstance(change, Replaced) and change.is_copy and any(slot.gguf in base.edited for slot in slots):
        problems.append("was trained on another base, whose values would take the place of what was merged before")
    edits.problems += [f"{change.tensor}: {problem}" for problem in problems]
    if problem := growing.claims.problem(change.tensor, slots):
        edits.problems.append(problem)
    if problems or problem or not slots:
        return []
    return [slots, for_output(slots)] if tie is Tie.TIED else [slots]


def _slots(edits: Edits, base: AdaptedBase, change: Change) -> list[Slot]:
    """The places in the base; a tied output, and biases that the base has not, are made."""
    slots = find_slots(base, change.tensor)
    there = [slot for slot in slots if slot.gguf in base.shapes]
    if base.is_tied and is_output(base, change.tensor):
        there = slots
    elif slots and not there and change.tensor.endswith(".bias"):
        if isinstance(change, Transformed) and change.if_there:
            return []
        there = slots
        edits.added |= {slot.gguf: (_outputs(base, slot),) for slot in slots}
    if not there:
        if not (isinstance(change, Transformed) and change.if_there):
            edits.problems.append(f"{change.tensor}: {_absence(base, change.tensor)}")
        return []
    if problem := _untied(edits, base, change) or misfit(base, change, there[0]):
        edits.problems.append(problem)
        return []
    return there


def _untied(edits: Edits, base: AdaptedBase, change: Change) -> str:
    """Note that a change parts the output from the embeddings; or why it cannot."""
    is_one_of_two = is_embedding(base, change.tensor) or is_output(base, change.tensor)
    if not base.is_tied or not is_one_of_two or keeps_tie(change):
        return ""
    edits.unties = True
    if base.family.can_untie:
        return ""
    what = "changes the embeddings or the output alone, and llama.cpp's"
    return f"{change.tensor}: {what} {base.family.architecture} always takes one for both"


def _absence(base: AdaptedBase, tensor: str) -> str:
    architecture = base.family.architecture
    if is_known(base.family, tensor):
        return "the base has no such tensor"
    if tensor.endswith(".bias") and is_known(base.family, tensor.removesuffix("bias") + "weight"):
        return f"llama.cpp's {architecture} adds no bias there"
    return f"no tensor of a {architecture} model"


def _outputs(base: AdaptedBase, slot: Slot) -> int:
    """Values of a bias that the base has not: one for each row of the weight, of which a slot may be a part."""
    weight = base.shapes.get(slot.gguf.removesuffix("bias") + "weight", (len(slot.rows), 1))
    return prod(weight[:-1])


def pair_edits(pairs: Sequence[Pair], base: AdaptedBase, scale: float) -> Edits:
    """Those of a GGUF adapter, whose pairs are placed already."""
    edits = Edits()
    for pair in pairs:
        if pair.tensor not in base.shapes and not (pair.tensor == OUTPUT and base.is_tied):
            edits.problems.append(f"{pair.tensor}: the base has no such tensor")
            continue
        wanted = base.shapes[EMBEDDING if pair.tensor == OUTPUT and base.is_tied else pair.tensor]
        if pair.shape != wanted:
            edits.problems.append(f"{pair.tensor}: the adapter is for {pair.shape}, the base has {wanted}")
        edits.unties |= base.is_tied and pair.tensor in (EMBEDDING, OUTPUT)
        edits.by_tensor[pair.tensor] = [sum_of(_unmultiplied(edits, base, pair), scale)]
    return edits


def _unmultiplied(edits: Edits, base: AdaptedBase, pair: Pair) -> Pair:
    """A pair as a change of the weights, where llama.cpp multiplies what they give and not what an adapter adds."""
    factors = factors_of(base, pair.tensor)
    if factors is None or pair.shape != base.shapes[pair.tensor]:
        return pair
    zeros = factors == 0
    if zeros.any() and pair.load()[0][zeros].any():
        edits.problems.append(f"{pair.tensor}: changes experts whose scale is 0, which no weights could")
    return multiplied(pair, np.where(zeros, 0, 1 / np.where(zeros, 1, factors)).astype(np.float32))


def edited_base(base: AdaptedBase, edits: Edits) -> AdaptedBase:
    """A base as it is after some edits: what the next adapter changes."""
    shapes = {**base.shapes, **edits.added}
    if edits.unties:
        shapes[OUTPUT] = base.shapes[EMBEDDING]

    def read(name: str, start: int, stop: int) -> Floats:
        if name in edits.added:
            return np.zeros((1, edits.added[name][0]), np.float32)
        return base.rows(name if name in base.shapes else EMBEDDING, start, stop)

    def rows(name: str, start: int, stop: int) -> Floats:
        return edits.apply(name, read(name, start, stop), start)

    def restored(name: str, start: int, stop: int) -> Floats:
        return Edits(edits.restored).apply(name, base.released.rows(name, start, stop), start)

    released = replace(base.released, rows=restored) if edits.restored else base.released
    edited = base.edited | edits.by_tensor.keys()
    return replace(base, shapes=shapes, rows=rows, original=released, edited=edited)


def joined(several: Sequence[Edits]) -> Edits:
    """The edits of several adapters, one after another."""
    out = Edits()
    for edits in several:
        for all_of_them, more in ((out.by_tensor, edits.by_tensor), (out.restored, edits.restored)):
            for name, of_tensor in more.items():
                all_of_them.setdefault(name, []).extend(of_tensor)
        out.added |= edits.added
        out.unties |= edits.unties
        out.problems += edits.problems
    return out
