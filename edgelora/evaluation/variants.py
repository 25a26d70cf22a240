"""What is evaluated: a base, and each adapter on it; and the same on other quantizations of the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BASE = "base"
BARE = "none"
"""What an engine calls the base without an adapter."""


@dataclass(frozen=True)
class Variant:
    """One model that answers every row.

    Attributes:
        name: what tables call it: "base", "support", "support on model-q2_k".
        base: the GGUF file.
        adapter: what the engine calls the adapter, `BARE` for none.
        reference: the variant it is compared with: an adapter with the bare base, what runs on another quantization
            with the same on the first; empty for the first base itself.
        is_requantized: whether the reference is the same adapter on another file.
    """

    name: str
    base: Path
    adapter: str
    reference: str = ""
    is_requantized: bool = False


def variants_of(base: Path, adapters: Sequence[str], others: Sequence[Path] = ()) -> list[Variant]:
    """Every model to be evaluated, in the order of tables; those of one base follow each other.

    Args:
        adapters: their names.
        others: quantizations of `base` to be compared with it.
    """
    first = [Variant(BASE, base, BARE), *(Variant(name, base, name, BASE) for name in adapters)]
    names = _names([base, *others])[1:]
    return first + [
        Variant(f"{each.name} on {name}", other, each.adapter, each.name, is_requantized=True)
        for other, name in zip(others, names, strict=True)
        for each in first
    ]


def _names(files: Sequence[Path]) -> list[str]:
    """A name for each file; those of one name in several folders get a number."""
    return list(_numbered([file.stem for file in files]))


def _numbered(stems: Sequence[str]) -> Iterator[str]:
    for place, stem in enumerate(stems):
        before = stems[:place].count(stem)
        yield f"{stem} ({before + 1})" if before else stem
