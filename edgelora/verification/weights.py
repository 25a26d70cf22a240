"""Does the adapter's file add to each weight what the certificate says?

This looks at no base weight and computes with no model, so it is as sharp on a Q2_K base as on an F32 one. The file's
rows are brought into transformers' order by the families' tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.adapted_base import open_base
from converters.block_types import TYPES
from converters.dequantize import dequantize_rows
from converters.placement import Slot, find_slots, source_shape
from converters.reader import GGUFHeader, TensorInfo, read_header
from edgelora.adapter_ref import AdapterRef
from edgelora.change_samples import SAMPLES, ChangeSample, inputs_of, sample
from edgelora.engine.preflight import Pair, pairs_of

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WeightComparison:
    """The changes of all weights.

    Attributes:
        errors: tensor's name in transformers to |sample here - sample recorded| / |sample recorded|; 1 where the file
            leaves the weight alone.
        unplaced: tensors of the certificate that this base does not have.
        unexplained: weights that the file changes, by GGUF name, and that the certificate does not know.
    """

    errors: Mapping[str, float]
    unplaced: tuple[str, ...]
    unexplained: tuple[str, ...]

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor that is farthest off, and how far."""
        return max(self.errors.items(), key=lambda pair: pair[1], default=("", 0.0))


def compare_weights(
    changes: Sequence[ChangeSample], adapter: AdapterRef, base: Path, repair: Mapping[str, int] | None = None
) -> WeightComparison:
    """The changes that a GGUF adapter makes to a base, against those recorded.

    Args:
        adapter: one that passed `check_adapter` on this base.
        repair: by GGUF name, how many of a tensor's last ranks were not trained, but repair the base.

    Raises:
        ConversionError: a base of a family whose order of rows is not known here.
    """
    header, repair = read_header(adapter.path), repair or {}
    pairs, errors, unplaced = pairs_of(header), {}, []
    explained: set[str] = set()
    with open_base(base) as opened:
        for change in changes:
            slots = find_slots(opened, change.tensor)
            if not slots or source_shape(opened, slots[0])[-2:] != change.shape:
                unplaced.append(change.tensor)
                continue
            explained.update(slot.gguf for slot in slots)
            found = _sample(change, slots, pairs, _scale(header, adapter.scale), repair)
            errors[change.tensor] = _relative(found, change.values)
    trained = [name for name, (a, _) in pairs.items() if a is None or a.shape[-2] > repair.get(name, 0)]
    unexplained = tuple(name for name in trained if name not in explained)
    return WeightComparison(errors, tuple(unplaced), unexplained)


def _relative(found: npt.NDArray[np.float64], wanted: Floats) -> float:
    difference, length = float(np.linalg.norm(found - wanted)), float(np.linalg.norm(wanted))
    return difference / length if length else float(difference > 0)


def _scale(header: GGUFHeader, scale: float) -> tuple[float, float]:
    """The user's scale, and the file's alpha (0: the scale is in B)."""
    return scale, float(header.metadata.get("adapter.lora.alpha", 0.0))


def _sample(
    change: ChangeSample,
    slots: Sequence[Slot],
    pairs: Mapping[str, Pair],
    scale: tuple[float, float],
    repair: Mapping[str, int],
) -> npt.NDArray[np.float64]:
    n_outputs, n_inputs = change.shape
    inputs = inputs_of(change.tensor, n_inputs)
    outputs = np.zeros((SAMPLES, n_outputs))
    for slot in slots:
        a, b = pairs.get(slot.gguf, (None, None))
        if a is not None and b is not None:
            ordered = inputs if slot.columns is None else inputs[:, slot.columns]
            own = a.shape[-2] - repair.get(slot.gguf, 0)
            outputs[:, slot.source] = _outputs(_read(a)[..., :own, :], _read(b)[..., :own], ordered, slot.rows, scale)
    return sample(change.tensor, outputs)


def _outputs(a: Floats, b: Floats, inputs: npt.NDArray[Any], rows: npt.NDArray[Any], scale: tuple[float, float]) -> Any:
    """What B @ A makes of inputs (SAMPLES, n_in) in some of its rows: (SAMPLES, n_rows). Matrices may be stacked."""
    rank, each = a.shape[-2], b.shape[-2]
    factor = scale[0] * scale[1] / rank if scale[1] else scale[0]
    a, b = a.reshape(-1, rank, a.shape[-1]), b.reshape(-1, each, rank)
    found = np.empty((len(inputs), len(rows)))
    for number in np.unique(rows // each):
        at = rows // each == number
        found[:, at] = (inputs @ a[number].T.astype(np.float64)) @ b[number][rows[at] % each].T * factor
    return found


def _read(tensor: TensorInfo) -> Floats:
    block_type, n_cols = TYPES[tensor.type_name], tensor.shape[-1]
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        data = np.frombuffer(file.read(tensor.size_bytes), np.uint8)
    values: Floats = dequantize_rows(data.reshape(-1, block_type.row_bytes(n_cols)), block_type, n_cols)
    return values.reshape(tensor.shape)
