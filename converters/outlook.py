"""What an adapter can become, seen from its shapes alone: asked before it is trained, when its values say nothing yet.

A conversion decides by what each change is, not by its values: low-rank ones fit a GGUF adapter, functions of the
weight are approximated, whole tensors and biases are merged into a base. So an adapter as it begins has the answer
that it will have when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from converters.adapted_base import AdaptedBase, open_base
from converters.adapter import against_base
from converters.adapter_source import AdapterSource, open_adapter
from converters.compile import NO_PLACE, compile_changes
from converters.errors import BaseMismatchError, UnsupportedAdapterError
from converters.methods import Change, Replaced, Transformed


@dataclass(frozen=True)
class Outlook:
    """What will come of an adapter.

    Attributes:
        kind: "adapter" (a GGUF adapter, exactly), "approximate" (a GGUF adapter that comes close), "merge" (only a part
            of its base) or "refused".
        reasons: why it is no GGUF adapter.
    """

    kind: str
    reasons: tuple[str, ...] = ()


def outlook(folder: Path, base: Path) -> Outlook:
    """What the adapter in a PEFT folder can become on a base.

    Args:
        folder: as PEFT saves it, trained or not.
        base: a Hugging Face folder, or a GGUF file.

    Raises:
        ConversionError: files that are missing or broken.
    """
    with open_base(base) as opened:
        try:
            with open_adapter(folder, opened) as read:
                return _of(against_base(read, opened), opened)
        except (UnsupportedAdapterError, BaseMismatchError) as error:
            return Outlook("refused", _reasons(error.message))


def _of(adapter: AdapterSource, base: AdaptedBase) -> Outlook:
    reading = adapter.reading
    if reading.problems:
        return Outlook("refused", tuple(reading.problems))
    approximated = [change for change in reading.changes if _is_approximated(change)]
    whole = [change for change in reading.changes if _is_trained_whole(change)]  # as yet it may be the base's own
    others = [c for c in reading.changes if not (_is_approximated(c) or _is_trained_whole(c))]
    compiled = compile_changes(replace(reading, changes=others), base)
    no_place = [f"{change.tensor}: {NO_PLACE[Replaced]}" for change in whole]
    no_place += [
        f"{change.tensor}: only matrices are approximated" for change in approximated if len(change.shape) != 2
    ]
    reasons = (*compiled.problems, *compiled.misfits, *compiled.tied, *no_place)
    if reasons:
        unmerged = (*reading.not_merged, *compiled.misfits)
        return Outlook("refused" if unmerged else "merge", reasons)
    rough = [change for change in approximated if isinstance(change, Transformed) and not change.has_few_ranks]
    return Outlook("approximate" if rough else "adapter")


def _is_approximated(change: Change) -> bool:
    return isinstance(change, Transformed) and not change.tensor.endswith(".bias")


def _is_trained_whole(change: Change) -> bool:
    return isinstance(change, Replaced) and not change.is_copy


def _reasons(message: str) -> tuple[str, ...]:
    first, *rest = message.split("\n  - ")
    return tuple(rest) or (first,)
