"""LoRA initialisations that move a part of the base into the adapter, undone.

PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775), CorDA (arXiv:2406.05223) and LoRA-GA (arXiv:2407.05000) begin with
factors A0 and B0 and take them out of the base: what was trained is (W - s B0 A0) + s B A. Against the base as it was
released that is a LoRA of twice the rank, W + s (B A - B0 A0). A0 and B0 are in a folder that was saved before
training, or follow from W where the initialisation is a plain function of it. On a base in half precision PEFT rounds
what is left of W once more; that is in no file, and stays out. LoftQ (arXiv:2310.08659) quantizes the base besides,
which no folder with A0 and B0 undoes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from converters.checkpoint import Floats
from converters.errors import UnsupportedAdapterError
from converters.low_rank import balanced, leading
from converters.methods import LowRank, Reading, Transformed

Weight = Callable[[str], Floats | None]
"""A transformers tensor's name to the base's values, float32 (rows, columns); None where the base has none."""

# Names of folders in which A0 and B0 are kept, inside the adapter's: PEFT's examples, and LLaMA-Factory's.
FOLDERS = ("pissa_init", "olora_init", "corda_init", "lora_ga_init", "initial")
ROUNDED = (
    "what {} took out of the base at its beginning is put back: exact where that base was float32; one in half "
    "precision was rounded once more then, which no file of the adapter's holds (`verify` shows what it comes to)"
)
PLAIN = ("gaussian", "orthogonal", "eva", "mica")  # they leave the base as it was
LOFTQ = "loftq"
WHAT_TO_SAVE = (
    "it moved a part of the base into the adapter. Save the adapter before training too "
    '(model.save_pretrained("initial")) and give that folder with --initial, or save the result with PEFT\'s '
    "path_initial_model_for_weight_conversion"
)
BASE_TO_SAVE = (
    "it was trained on a base that LoftQ had quantized. Save that base too (model.unload().save_pretrained), set "
    "init_lora_weights to true in adapter_config.json, and convert it against that base"
)


def what_to_save(init: str) -> str:
    """What would have to be there for an adapter with this initialisation."""
    return BASE_TO_SAVE if init == LOFTQ else WHAT_TO_SAVE


def moved_base(init: object) -> str:
    """The initialisation's name, where it is one that changed the base; "" otherwise."""
    if init is None or isinstance(init, bool):
        return ""
    name = str(init).lower() if isinstance(init, str) else repr(init)
    return "" if name in PLAIN else name


def initial_folder(folder: Path) -> Path | None:
    """The folder with A0 and B0 inside an adapter's, if there is one."""
    return next((folder / name for name in FOLDERS if (folder / name / "adapter_config.json").is_file()), None)


def with_initial(reading: Reading, initial: Reading, init: str = "") -> Reading:
    """Every change less the one it began with.

    Args:
        initial: the adapter before it was trained.
        init: the initialisation's name; what no initial state undoes becomes a problem.
    """
    begun = {change.tensor: change for change in initial.changes if isinstance(change, LowRank)}
    ours = {change.tensor: change for change in reading.changes if isinstance(change, LowRank)}
    problems = [
        *([f"init_lora_weights is {init!r}: {BASE_TO_SAVE}"] if init == LOFTQ else []),
        *(
            f"{tensor}: is in one of the adapter and its initial state only"
            for tensor in sorted(set(ours) ^ set(begun))
        ),
        *(
            f"{tensor}: is {ours[tensor].shape}, its initial state {begun[tensor].shape}"
            for tensor in ours
            if tensor in begun and begun[tensor].shape != ours[tensor].shape
        ),
        *(f"initial state: {problem}" for problem in initial.problems),
    ]

    def undone(change: LowRank) -> LowRank:
        before = begun.get(change.tensor)
        if before is None or before.shape != change.shape:
            return change
        return _less(change, before.rank, before.load)

    return _undone(reading, init, undone, problems)


def recomputed(reading: Reading, init: str, weight: Weight) -> Reading:
    """Every change less the one it began with, which follows from the base's weights.

    Args:
        init: "pissa" or "olora".
        weight: called when a change is loaded; None for a tensor that the base does not have.

    Raises when a change is loaded:
        UnsupportedAdapterError: the first state does not follow from the base.
    """

    def undone(change: LowRank) -> LowRank:
        begun = cache(partial(_begun, init, change, weight))  # small, and found by decomposing a layer
        return _less(change, change.rank, begun)

    return _undone(reading, init, undone)


def _undone(reading: Reading, init: str, undo: Callable[[LowRank], LowRank], problems: Sequence[str] = ()) -> Reading:
    """Low-rank changes undone; others of a matrix depend on a base that the initialisation changed."""
    changes = tuple(undo(change) if isinstance(change, LowRank) else change for change in reading.changes)
    others = [
        f"{change.tensor}: init_lora_weights is {init!r}, and its change is no plain LoRA: it depends on the base that "
        "this initialisation left; merge it with PEFT (merge_and_unload), and convert the result"
        for change in changes
        if (isinstance(change, Transformed) and not change.tensor.endswith(".bias"))
        or (isinstance(change, LowRank) and (len(change.shape) != 2 or change.is_embedding))
    ]
    return replace(reading, changes=changes, problems=(*reading.problems, *problems, *(others if init else ())))


def _begun(init: str, change: LowRank, weight: Weight) -> tuple[Floats, Floats]:
    values = weight(change.tensor)
    if values is None or values.shape != change.shape:  # which is refused by name where it is placed
        rows, columns = change.shape
        return np.zeros((rows, 0), np.float32), np.zeros((0, columns), np.float32)
    try:
        return RECOMPUTED[init](values, change)
    except ValueError as error:
        raise UnsupportedAdapterError(
            f"{change.tensor}: init_lora_weights is {init!r}, and what that took out of the base is uncertain: {error}",
            hint="Name the adapter's state before training with --initial.",
        ) from None


def _pissa(values: Floats, change: LowRank) -> tuple[Floats, Floats]:
    """The largest singular values of W; the scale cancels out (`pissa_init`, peft/tuners/lora/layer.py)."""
    found = leading(values, change.rank)
    return found.b, found.a


def _olora(values: Floats, change: LowRank) -> tuple[Floats, Floats]:
    """The first columns of Q and rows of R in W = Q R (`olora_init`, peft/tuners/lora/layer.py)."""
    q = np.linalg.qr(values[:, : change.rank].astype(np.float64))[0]
    r = q.T @ values
    return (change.scale * q).astype(np.float32), r.astype(np.float32)


RECOMPUTED: Mapping[str, Callable[[Floats, LowRank], tuple[Floats, Floats]]] = {"pissa": _pissa, "olora": _olora}


def _less(change: LowRank, rank: int, begun: Callable[[], tuple[Floats, Floats]]) -> LowRank:
    """Training moves A and B little: as [B, -B0] and [A, A0] the difference would drown in what F16 rounds."""

    def load() -> tuple[Floats, Floats]:
        (b, a), (b0, a0) = change.load(), begun()
        missing = rank - len(a0) if a0.ndim == 2 else 0  # of a layer with fewer singular values than ranks
        b0, a0 = (np.pad(b0, ((0, 0), (0, missing))), np.pad(a0, ((0, missing), (0, 0)))) if missing else (b0, a0)
        return balanced(np.concatenate((b, -b0), axis=-1), np.concatenate((a, a0), axis=-2))

    return replace(change, rank=change.rank + rank, load=load)
