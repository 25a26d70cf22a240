"""An output that is the embeddings, and what changes both: in files that hold one tensor for the two, or one for each.

tokens trained for both (trainable_token_indices)   token_embd.weight, and output.weight where the file has one
LoRA on the output alone                            output.weight, which becomes a tensor of its own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from converters.adapted_base import AdaptedBase, Tie
from converters.methods import Change, Shifted
from converters.placement import Slot, find_slots
from converters.tensor_kinds import EMBEDDING, OUTPUT

UNKNOWN = (
    "it changes the embeddings and an output that is tied to them, and whether this file's is cannot be seen: the two "
    "are nearly the same. Give the Hugging Face folder as the base, or what `edgelora convert --untie` makes of it"
)


def is_embedding(base: AdaptedBase, tensor: str) -> bool:
    return any(slot.gguf == EMBEDDING for slot in find_slots(base, tensor))


def is_output(base: AdaptedBase, tensor: str) -> bool:
    return any(slot.gguf in (OUTPUT, "output.bias") for slot in find_slots(base, tensor))


def embedding_name(base: AdaptedBase) -> str:
    """The embeddings' tensor in transformers."""
    row = next(row for row in base.family.rows if row.gguf == "token_embd")
    return f"{row.modules[0]}.weight"


def keeps_tie(change: Change) -> bool:
    """Whether a tied output changes with the embeddings."""
    return not isinstance(change, Shifted) and change.keeps_tie


def tie_for(base: AdaptedBase, change: Change, changes: Sequence[Change]) -> Tie:
    """Whether a change of the embeddings is one of the output too.

    Args:
        changes: all of the adapter's. One that has the embeddings and the output alike needs no answer.
    """
    if not keeps_tie(change):
        return Tie.APART
    has_both = any(keeps_tie(other) and is_output(base, other.tensor) for other in changes)
    return Tie.APART if base.tie is Tie.UNKNOWN and has_both else base.tie


def for_output(slots: Sequence[Slot]) -> list[Slot]:
    """The same rows of the output."""
    return [replace(slot, gguf=OUTPUT) for slot in slots]
