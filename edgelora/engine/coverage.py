"""Which of an adapter's tensors a model's graph really computes with.

llama.cpp loads any pair whose base tensor exists, and says "loaded"; some graphs multiply with a weight in a way that
never looks for its adapter. What is computed is in the graph: nodes whose sources are the pair, by their names in the
file, as in `blk.0.attn_q.weight.lora_a`. Which nodes does not matter: products (MUL_MAT, of experts MUL_MAT_ID), or
for token embeddings looked-up rows (GET_ROWS).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from edgelora.engine.graph import Node, operations, weight_name

MARK = b".lora_"


@dataclass(frozen=True)
class Coverage:
    """What of an adapter was applied.

    Attributes:
        applied: names of its tensors that nodes were computed from.
        unused: names of the others, in the file's order.
    """

    applied: frozenset[str]
    unused: tuple[str, ...]

    @property
    def total(self) -> int:
        return len(self.applied) + len(self.unused)


class Counter:
    """A `cb_eval` that looks at each node before it is computed, and at no values.

    Args:
        tensors: names of the adapter's tensors.
    """

    def __init__(self, tensors: Iterable[str]) -> None:
        operations()  # nodes are laid out as this version knows them, or an error says so
        self._tensors = list(tensors)
        self._seen: set[str] = set()
        self.counting = True

    def __call__(self, address: int, ask: bool, _user_data: Any) -> bool:
        if ask and self.counting:
            for source in filter(None, Node.from_address(address).src[:]):
                node = Node.from_address(source)
                if MARK in node.name:
                    self._seen.add(weight_name(node))
        return not ask  # none of the values are wanted

    def coverage(self) -> Coverage:
        """Of all decodes while `counting` was on."""
        applied = frozenset(name for name in self._tensors if name in self._seen)
        return Coverage(applied, tuple(name for name in self._tensors if name not in applied))
