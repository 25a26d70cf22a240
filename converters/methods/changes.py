"""What an adapter does to its base, tensor by tensor: transformers' names, nn.Linear's orientation (rows are outputs).

    LowRank      W + B @ A               LoRA, and every method whose change has few ranks by its construction
    Transformed  any other function of W DoRA, IA3, OFT ...
    Replaced     another tensor          trained norms, modules_to_save
    Shifted      v + change              biases; the base may have none

A GGUF adapter holds the first, approximates the second, and cannot hold the others; a merged base holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from converters.checkpoint import Floats
from converters.writer import Value

Shape = tuple[int | None, ...]
"""Sizes in numpy order; None where the adapter does not tell."""


class Turned(Enum):
    """How to see whether the matrices of a stack lie the other way round; where rows and columns differ, by the sizes.

    UNLESS_TRANSPOSED are those of a base that stores the transpose; UNKNOWN are those of a file that does not say which
    of the ways is its own.
    """

    NEVER = "never"
    ALWAYS = "always"
    UNLESS_TRANSPOSED = "unless transposed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class LowRank:
    """W + B @ A.

    Attributes:
        tensor: of the base ("model.layers.3.mlp.up_proj.weight").
        shape: (rows, columns); of a stack (experts, rows, columns).
        scale: what PEFT multiplies B @ A by; B has it in already.
        load: B (rows, rank) and A (rank, columns) in float32; of a stack (experts, rows, rank) and (experts, rank,
            columns).
        is_embedding: the module looks rows up; (rows, columns) is (vocabulary, embedding).
        keeps_tie: an output that is tied to the embeddings changes with them.
        turned: whether a stack's matrices lie the other way round, (columns, rows); see `parameters`.
    """

    tensor: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    load: Callable[[], tuple[Floats, Floats]]
    is_embedding: bool = False
    keeps_tie: bool = False
    turned: Turned = Turned.NEVER


@dataclass(frozen=True)
class Transformed:
    """Another function of W.

    Attributes:
        tensor: of the base; `.bias` too, where a method changes biases.
        shape: (rows, columns), of a stack (experts, rows, columns), of a vector (values,).
        apply: rows of W as float32 (n, columns) and the number of the first to the changed rows; a stack's matrices
            follow one another, a vector is one row. With `by_rows` it is called with any range of rows, otherwise with
            all of them. It never writes into its argument, and may be called from several threads.
        uses_weight: without, it adds the same whatever W is.
        if_there: a base without this tensor needs no change.
        keeps_tie: an output that is tied to the embeddings changes with them.
        has_few_ranks: whatever W is, it changes by a product of thin matrices, which an adapter holds exactly.
    """

    tensor: str
    shape: Shape
    apply: Callable[[Floats, int], Floats]
    by_rows: bool = True
    uses_weight: bool = True
    if_there: bool = False
    keeps_tie: bool = False
    has_few_ranks: bool = False


@dataclass(frozen=True)
class Replaced:
    """A tensor of its own instead of the base's.

    Attributes:
        load: float32, in `shape`, as transformers stores it.
        is_copy: PEFT saved it beside a layer that it changes otherwise: the base's own, unless it was resized.
        keeps_tie: an output that is tied to the embeddings changes with them.
    """

    tensor: str
    shape: tuple[int, ...]
    load: Callable[[], Floats]
    is_copy: bool = False
    keeps_tie: bool = False


@dataclass(frozen=True)
class Shifted:
    """A vector that is added to the base's, or to zeros where it has none. `load` gives it, float32 (values,)."""

    tensor: str
    shape: tuple[int, ...]
    load: Callable[[], Floats]


Change = LowRank | Transformed | Replaced | Shifted


@dataclass(frozen=True)
class Reading:
    """An adapter read.

    Attributes:
        problems: what makes the adapter unusable, in any form.
        not_merged: why it cannot be merged into its base, where it cannot.
        metadata: keys for the GGUF adapter.
    """

    changes: Sequence[Change]
    problems: Sequence[str] = ()
    not_merged: Sequence[str] = ()
    metadata: Mapping[str, Value] = field(default_factory=dict)


class ModuleProblem(Exception):
    """One module's tensors do not go together; the message says why, without the module's name."""
