"""MiSS and Bone (arXiv:2409.15371): one small block repeated over the whole matrix.

    init_weights true   W[o, i] + block[i % r, o]                  block (r, rows)
                 "mini" W[o, i] + block[i % r, o % mini_r]         block (r, mini_r)
                 "bat"  W + W[p, q] @ M[p] + M[p], of (r, r) parts of W; block (rows / r, r, r) holds M

PEFT's names: <module>.miss_block, <module>.bone_block. The first two have no more ranks than the block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import factored, quiet, recent
from converters.methods.method import Method, Module
from converters.peft_settings import choice, rank


def read(module: Module) -> Iterator[Change]:
    rows, columns = module.base_shape()
    shape, r = module.shape("block"), module.setting("r")
    kind = module.setting("init_weights")
    wide = module.setting("mini_r") if kind == "mini" else rows
    expected = (rows // r, r, r) if kind == "bat" else (r, wide)
    if shape != expected or 0 in shape or r > columns or rows % wide:
        raise ModuleProblem(f"its block is {shape}, for a weight {(rows, columns)} it must be {expected}")
    if kind != "bat":
        yield _tiled(module, (rows, columns), (r, wide))
    elif rows % r or columns % r:
        raise ModuleProblem(f"a weight {(rows, columns)} cannot be cut into parts {(r, r)}")
    else:
        yield _parts(module, (rows, columns), r)


def _tiled(module: Module, shape: tuple[int, int], block: tuple[int, int]) -> Change:
    rows, columns = np.arange(shape[0]) % block[1], np.arange(shape[1]) % block[0]

    def values() -> Floats:
        return np.ascontiguousarray(module.load("block").T)  # (repeated rows, repeated columns)

    def load() -> tuple[Floats, Floats]:
        if block[1] < block[0]:
            return np.eye(block[1], dtype=np.float32)[rows], values()[:, columns]
        return values()[rows], np.eye(block[0], dtype=np.float32)[:, columns]

    def rows_of_change(start: int, stop: int) -> Floats:
        return recent(values)[rows[start:stop]][:, columns]

    return factored(module.weight, shape, min(block), 1.0, load, rows_of_change)


def _parts(module: Module, shape: tuple[int, int], r: int) -> Transformed:
    def values() -> Floats:
        return module.load("block")

    @quiet
    def apply(weight: Floats, start: int) -> Floats:
        blocks, changed = recent(values), weight.copy()
        for part in range(start // r, -(-(start + len(weight)) // r)):
            first, last = max(part * r, start), min((part + 1) * r, start + len(weight))
            where = slice(first - start, last - start)
            parts = weight[where].reshape(-1, r) @ blocks[part]
            own = blocks[part][first - part * r : last - part * r]
            changed[where] += parts.reshape(last - first, shape[1]) + np.tile(own, shape[1] // r)
        return changed

    return Transformed(module.weight, shape, apply)


METHOD = Method(
    "MiSS",
    "arXiv:2409.15371",
    parts={".miss_block": "block"},
    read=read,
    settings={"r": rank(64), "mini_r": rank(1), "init_weights": choice(True, True, False, "bat", "mini")},
    free=("miss_dropout",),
)
BONE = Method(
    "Bone",
    "arXiv:2409.15371",
    parts={".bone_block": "block"},
    read=read,
    settings={"r": rank(64), "mini_r": rank(1), "init_weights": choice(True, True, False, "bat")},
)
