"""Changes of transformers' tensors to the pairs of a GGUF adapter, or to the reasons why it cannot hold them.

Low-rank changes are placed as they are. A change without factors is computed against the base's weights and replaced
by the best low-rank one, whose error is stated; above `max_error` it is refused. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod, sqrt

import numpy as np

from converters.adapted_base import AdaptedBase, Tie
from converters.checkpoint import Floats
from converters.low_rank import approximate
from converters.methods import Change, LowRank, Reading, Replaced, Shifted, Transformed, Turned
from converters.pairs import Pair, Piece, assemble, multiplied
from converters.placement import Claims, Slot, factors_of, find_slots, is_known, oriented, source_shape
from converters.tensor_kinds import EMBEDDING, OUTPUT
from converters.tied_output import UNKNOWN, embedding_name, for_output, is_embedding, is_output, tie_for

DEFAULT_MAX_ERROR = 0.01
NOTHING = 1e-6  # of a weight's norm: a change below that is the rounding of float32
ROUNDED = (2.0**-8, 2.0**-24)  # relative and absolute error of a weight that went through BF16, F16, or both
MAX_FAILURES = 8  # of tensors above the error, before the others are not looked at any more
UNSURE = (
    "its matrices are square, and PEFT before 0.19.1 saved them the other way round: write the version that saved them "
    'into adapter_config.json ("peft_version": "0.17.1", say)'
)
INFINITE = "its change holds NaN or infinite values"
RESIZED = "it has {} rows and the base {}: other tokens have no place in a GGUF adapter"
NO_PLACE: dict[type[Change], str] = {
    Replaced: "it was trained as a whole, which has no place in a GGUF adapter",
    Shifted: "a bias, which has no place in a GGUF adapter",
}


@dataclass
class Compiled:
    """What came of an adapter's changes.

    Attributes:
        problems: why it cannot be a GGUF adapter; `misfits` are those of the base, `untie` those of its tied output.
        too_rough: tensors whose approximation misses the error asked for.
    """

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    residual: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    too_rough: list[str] = field(default_factory=list)
    is_approximate: bool = False
    claims: Claims = field(default_factory=Claims)

    def pairs(self, base: AdaptedBase) -> list[Pair]:
        return [self._pair(base, name, pieces) for name, pieces in self.pieces.items()]

    def _pair(self, base: AdaptedBase, name: str, pieces: list[Piece]) -> Pair:
        pair, factors = assemble(name, base.shapes[name], pieces), factors_of(base, name)
        pair = pair if factors is None else multiplied(pair, factors)
        return replace(pair, residual_energy=self.residual.get(name, 0.0))


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what becomes infinite is refused by name
def compile_changes(
    reading: Reading, base: AdaptedBase, *, rank: int | None = None, max_error: float = DEFAULT_MAX_ERROR
) -> Compiled:
    """Place every change.

    Args:
        rank: of approximations; None takes the fewest ranks that meet `max_error`.
        max_error: of an approximation, |change - B @ A| / |change| in Frobenius norms, for each tensor.
    """
    out = Compiled(problems=list(reading.problems))
    rough = [change for change in reading.changes if isinstance(change, Transformed)]
    for change in reading.changes:
        if isinstance(change, LowRank):
            for slots in _targets(out, base, change, reading):
                _place(out, base, oriented(base, change), slots)
        elif isinstance(change, Replaced) and is_base_copy(base, change):
            continue
        elif not isinstance(change, Transformed) and not _has_module(base, change.tensor):
            out.problems.append(f"{change.tensor}: no tensor of a {base.family.architecture} model")
        elif not isinstance(change, Transformed):
            what = RESIZED.format(change.shape[0], base.sizes.vocab) if is_resized(base, change) else ""
            out.problems.append(f"{change.tensor}: {what or NO_PLACE[type(change)]}")
    if out.problems or out.misfits:  # nothing long is begun for an adapter that is refused anyway
        rough = [change for change in rough if not _approximable(out, base, change)]
    for change in rough:
        if len(out.too_rough) < MAX_FAILURES:
            _approximate(out, base, change, reading, rank, max_error)
    return out


def _has_module(base: AdaptedBase, tensor: str) -> bool:
    """Whether models of this family have such a tensor, or a layer that could have such a bias."""
    return is_known(base.family, tensor) or is_known(base.family, f"{tensor.removesuffix('.bias')}.weight")


def _place(out: Compiled, base: AdaptedBase, change: LowRank, slots: Iterable[Slot]) -> None:
    for slot in slots:
        if problem := misfit(base, change, slot):
            out.misfits.append(problem)
            return
        if not slot.place.row.adaptable:
            out.problems.append(
                f"{change.tensor}: llama.cpp's {base.family.architecture} never applies an adapter to it"
            )
            return
        if base.is_tied and slot.gguf in (EMBEDDING, OUTPUT):
            out.tied.append(f"{change.tensor}: the base ties its embeddings to its output")
            return
        out.pieces.setdefault(slot.gguf, []).append(Piece(change, slot))


def is_base_copy(base: AdaptedBase, change: Replaced) -> bool:
    """Whether a tensor is the base's own, saved once more; the base's before other adapters changed it.

    Where that cannot be seen, of a base that was quantized or has adapters merged in it, PEFT's word is taken for what
    it saves beside a layer that it changes otherwise. That may also have been rounded, or the base's, to 16 bits.
    """
    base = base.released
    slots = [slot for slot in find_slots(base, change.tensor) if slot.gguf in base.shapes]
    if base.is_tied and is_output(base, change.tensor):
        slots = find_slots(base, embedding_name(base))
    if not slots or slots[0].place.hf_shape(base.sizes) != change.shape:
        return False
    if base.is_lossy or (base.merged and change.is_copy):
        return change.is_copy
    weight, loaded = weight_of(base, change.tensor, slots), change.load()
    values = loaded if weight.ndim == 1 else rows_first(loaded, slots[0])
    return np.allclose(weight, values, *ROUNDED) if change.is_copy else np.array_equal(weight, values)


def rows_first(values: Floats, slot: Slot) -> Floats:
    """A tensor as transformers stores it with its rows first: a transposed one is turned round."""
    return values.swapaxes(-1, -2) if slot.place.row.transposed and not slot.place.is_bias else values


def _targets(out: Compiled, base: AdaptedBase, change: Change, reading: Reading) -> list[list[Slot]]:
    """Where a change goes: once, or to the embeddings and to an output that follows them."""
    slots = _slots(out, base, change)
    tie = tie_for(base, change, reading.changes) if slots else Tie.APART
    if tie is Tie.UNKNOWN:
        out.problems.append(f"{change.tensor}: {UNKNOWN}")
    if problem := out.claims.problem(change.tensor, slots):
        out.problems.append(problem)
    if not slots or tie is Tie.UNKNOWN or (tie is Tie.TIED and is_output(base, change.tensor)):
        return []
    return [slots, for_output(slots)] if tie is Tie.TIED and not base.is_tied else [slots]


def _slots(out: Compiled, base: AdaptedBase, change: Change) -> list[Slot]:
    if base.is_tied and is_output(base, change.tensor):
        out.tied.append(f"{change.tensor}: the base ties its embeddings to its output")
        return []
    slots = find_slots(base, change.tensor)
    there = [slot for slot in slots if slot.gguf in base.shapes]
    if not there:
        what = "the base has no such tensor" if is_known(base.family, change.tensor) else "no tensor of"
        out.misfits.append(
            f"{change.tensor}: {what}" + ("" if "base" in what else f" a {base.family.architecture} model")
        )
    return there


def is_resized(base: AdaptedBase, change: Change) -> bool:
    """Whether a tensor takes the place of the embeddings or of the output with another number of tokens."""
    if not isinstance(change, Replaced) or not (is_embedding(base, change.tensor) or is_output(base, change.tensor)):
        return False
    wanted = find_slots(base, change.tensor)[0].place.hf_shape(base.sizes)
    return change.shape != wanted and change.shape[1:] == wanted[1:]


def misfit(base: AdaptedBase, change: Change, slot: Slot) -> str:
    wanted = slot.place.hf_shape(base.sizes) if isinstance(change, Replaced) else source_shape(base, slot)
    fits = len(change.shape) == len(wanted) and all(a in (None, b) for a, b in zip(change.shape, wanted, strict=True))
    is_unsure = isinstance(change, LowRank) and change.turned is Turned.UNKNOWN and not slot.place.row.transposed
    if fits and is_unsure and wanted[-1] == wanted[-2]:
        return f"{change.tensor}: {UNSURE}"
    if not fits and prod(wanted) != prod(size or 0 for size in change.shape):
        return f"{change.tensor}: the adapter is for {times(change.shape)}, {slot.gguf} is {times(wanted)}"
    return "" if fits else f"{change.tensor}: has shape {times(change.shape)}, {slot.gguf} {times(wanted)}"


def times(shape: Iterable[int | None]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


def _approximable(out: Compiled, base: AdaptedBase, change: Transformed) -> bool:
    """Whether a change of a matrix could be replaced by a low-rank one; otherwise the reason is noted."""
    if change.tensor.endswith(".bias"):
        if not change.if_there or any(slot.gguf in base.shapes for slot in find_slots(base, change.tensor)):
            out.problems.append(f"{change.tensor}: {NO_PLACE[Shifted]}")
        return False
    return True


def _approximate(
    out: Compiled, base: AdaptedBase, change: Transformed, reading: Reading, rank: int | None, max_error: float
) -> None:
    if not _approximable(out, base, change):
        return
    for slots in _targets(out, base, change, reading):
        if problem := misfit(base, change, slots[0]):
            out.misfits.append(problem)
            return
        _approximate_at(out, base, change, slots, rank, max_error)


def is_finite(change: Change) -> bool:
    """Whether what an adapter stores of a change is; of a function of the weight, that is seen as it is applied."""
    if isinstance(change, Transformed):
        return True
    loaded = change.load()
    return all(np.isfinite(values).all() for values in (loaded if isinstance(loaded, tuple) else (loaded,)))


def _approximate_at(
    out: Compiled, base: AdaptedBase, change: Transformed, slots: Sequence[Slot], rank: int | None, max_error: float
) -> None:
    weight = weight_of(base, change.tensor, slots)
    if weight.ndim != 2:
        out.problems.append(f"{change.tensor}: changes of vectors and stacks cannot be approximated by an adapter")
        return
    delta = change.apply(weight, 0) - weight
    if not np.isfinite(delta).all():
        out.problems.append(f"{change.tensor}: {INFINITE}")
        return
    if np.linalg.norm(delta) <= NOTHING * np.linalg.norm(weight):
        return
    found = approximate(delta, rank=rank, max_error=max_error)
    error = sqrt(found.residual_energy)
    if error > max_error:
        out.too_rough.append(f"{change.tensor}: {error:.1%} of its change is left out at rank {found.rank}")
        return
    _place(out, base, LowRank(change.tensor, weight.shape, found.rank, 1.0, lambda: (found.b, found.a)), slots)
    if not error:
        return
    out.is_approximate = True
    for slot in slots:
        out.residual[slot.gguf] = max(found.residual_energy, out.residual.get(slot.gguf, 0.0))


def weight_of(base: AdaptedBase, tensor: str, slots: Iterable[Slot] | None = None) -> Floats:
    """A transformers tensor of the base, float32, its rows first (a transposed one is turned round).

    Raises:
        ConversionError: it cannot be read.
    """
    slots = list(find_slots(base, tensor) if slots is None else slots)
    shape = source_shape(base, slots[0])
    if len(shape) == 1:
        return _vector_of(base, slots[0])
    whole = np.empty((prod(shape[:-1]), shape[-1]), np.float32)
    for slot in slots:
        rows = _read_rows(base, slot)
        if slot.columns is None:
            whole[slot.source] = rows
        else:
            whole[slot.source[:, None], slot.columns] = rows
    return whole.reshape(shape)


def _vector_of(base: AdaptedBase, slot: Slot) -> Floats:
    if slot.is_row:
        whole = base.rows(slot.gguf, int(slot.rows[0]), int(slot.rows[0]) + 1).reshape(-1)
    else:
        whole = np.empty(len(slot.source), np.float32)
        whole[slot.source] = base.rows(slot.gguf, 0, 1).reshape(-1)[slot.rows]
    value = slot.place.row.value
    return value.back(whole) if value and not slot.place.is_bias else whole


def _read_rows(base: AdaptedBase, slot: Slot) -> Floats:
    first, last = int(slot.rows.min()), int(slot.rows.max()) + 1
    rows = base.rows(EMBEDDING if slot.gguf == OUTPUT and base.is_tied else slot.gguf, first, last)
    return rows if len(rows) == len(slot.rows) and _ascends(slot) else rows[slot.rows - first]


def _ascends(slot: Slot) -> bool:
    return bool((np.diff(slot.rows) == 1).all())
