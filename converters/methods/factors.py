"""A change to one weight as two thin matrices: W + B @ A."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from converters.checkpoint import Floats


@dataclass(frozen=True)
class Factors:
    """What a method does to one module.

    Attributes:
        module: its name in transformers ("model.layers.3.mlp.up_proj").
        shape: (rows, columns) of the weight it changes.
        scale: what PEFT multiplies B @ A by; `load_b` has it in already.
        is_embedding: the module looks rows up instead of multiplying.
        load_a: float32 (rank, columns).
        load_b: float32 (rows, rank).
    """

    module: str
    shape: tuple[int, int]
    rank: int
    scale: float
    is_embedding: bool
    load_a: Callable[[], Floats]
    load_b: Callable[[], Floats]
