"""VB-LoRA (arXiv:2405.15179): LoRA whose A and B are made of vectors that all layers share.

    base_model.vblora_vector_bank       (vectors, length)
    <module>.vblora_logits_A            (rank, columns / length, vectors)
    <module>.vblora_logits_B            (rows / length, rank, vectors)

Each piece is the sum of the `topk` vectors with the largest logits, weighted by their softmax. Saved with
`save_only_topk_weights`, the logits' names have endings:

    ..._topk_indices  (..., topk)       ..._topk_weights  (..., topk - 1); the last one makes their sum 1
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, LowRank, ModuleProblem
from converters.methods.factored import quiet
from converters.methods.method import Method, Module, Whole
from converters.peft_settings import rank


def read(module: Module) -> Iterator[Change]:
    module.check("bank", None, None)
    length, rank = module.shape("bank")[1], module.setting("r")
    across, down = _pieces(module, "a", rank, None)[1], _pieces(module, "b", None, rank)[0]

    @quiet
    def load() -> tuple[Floats, Floats]:
        a, b = _mixed(module, "a"), _mixed(module, "b")
        return b.transpose(0, 2, 1).reshape(-1, rank), a.reshape(rank, -1)

    yield LowRank(module.weight, (down * length, across * length), rank, 1.0, load)


def _pieces(module: Module, side: str, *sizes: int | None) -> tuple[int, ...]:
    """How many pieces A or B has along its two dimensions, all of their tensors checked."""
    vectors, topk = module.shape("bank")[0], module.setting("topk")
    if topk > vectors:
        raise ModuleProblem(f"takes {topk} of {vectors} vectors")
    if side in module:
        module.check(side, *sizes, vectors)
        return module.shape(side)
    if f"{side}_indices" not in module or f"{side}_weights" not in module:
        raise ModuleProblem(f"has no logits of {side.upper()}")
    module.check(f"{side}_indices", *sizes, topk)
    indices = module.integers(f"{side}_indices")
    if module.shape(f"{side}_weights") != (*indices.shape[:2], topk - 1):
        raise ModuleProblem(f"{side}_weights {module.shape(f'{side}_weights')} do not fit {side}_indices")
    if indices.min() < 0 or indices.max() >= vectors:
        raise ModuleProblem(
            f"{side}_indices go from {indices.min()} to {indices.max()}, and there are {vectors} vectors"
        )
    return indices.shape


def _mixed(module: Module, side: str) -> Floats:
    """Pieces of A or B, (..., length)."""
    indices, weights = _chosen(module, side)
    bank = module.load("bank")
    mixed = np.zeros((*indices.shape[:2], bank.shape[1]), np.float32)
    for which in range(indices.shape[2]):
        mixed += weights[..., which, None] * bank[indices[..., which]]
    return mixed


def _chosen(module: Module, side: str) -> tuple[Whole, Floats]:
    """Indices and weights of the vectors in each piece, (..., topk)."""
    topk = module.setting("topk")
    if side not in module:
        weights = module.load(f"{side}_weights")
        last = np.maximum(1 - weights.sum(axis=-1, keepdims=True), 0)
        return module.integers(f"{side}_indices"), np.concatenate([weights, last], axis=-1)
    logits = module.load(side)
    indices = np.argsort(-logits, axis=-1, kind="stable")[..., :topk]
    largest = np.take_along_axis(logits, indices, axis=-1)
    powers = np.exp(largest - largest[..., :1])
    return indices, powers / powers.sum(axis=-1, keepdims=True)


PARTS = {
    f".vblora_logits_{side.upper()}{ending}": f"{side}{role}"
    for side in ("a", "b")
    for ending, role in (("", ""), ("_topk_indices", "_indices"), ("_topk_weights", "_weights"))
}
METHOD = Method(
    "VB-LoRA",
    "arXiv:2405.15179",
    parts=PARTS,
    shared={"vblora_vector_bank": "bank"},
    needed=("bank",),
    read=read,
    settings={"r": rank(4), "topk": rank(2)},
    free=(
        "fan_in_fan_out", "init_logits_std", "init_vector_bank_bound", "num_vectors", "save_only_topk_weights",
        "vblora_dropout", "vector_length",
    ),
)  # fmt: skip
