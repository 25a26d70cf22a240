"""GraLoRA (arXiv:2505.20355): k * k blocks, each with a low-rank change of its own; and LoRA beside it (`hybrid_r`).

With s = r / k ranks a block, and the scale alpha / (r + hybrid_r):

    block (j, n) of W + scale * B[j, n*s : (n+1)*s].T @ A[n, :, j*s : (j+1)*s].T

PEFT's names: <module>.gralora_A (k, columns / k, r), .gralora_B (k, r, rows / k), .gralora_A_general.weight
(hybrid_r, columns), .gralora_B_general.weight (rows, hybrid_r). All blocks together have k * r ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem
from converters.methods.factored import factored, recent
from converters.methods.method import Method, Module, scaled
from converters.peft_settings import number, rank, whole

ROLES = ("a", "b", "general_a", "general_b")


def read(module: Module) -> Iterator[Change]:
    rows, columns = _check(module)
    blocks, r, hybrid = (module.setting(key) for key in ("gralora_k", "r", "hybrid_r"))
    scale = float(module.setting("alpha") / (r + hybrid))

    def load() -> tuple[Floats, Floats]:
        b, a = _spread(module.load("a"), module.load("b"))
        if hybrid:
            b = np.concatenate([b, module.load("general_b")], axis=1)
            a = np.concatenate([a, module.load("general_a")])
        return scaled(b, scale), a

    def parts() -> list[Floats]:
        return [module.load(role) for role in ROLES if role in module]

    def rows_of_change(start: int, stop: int) -> Floats:
        a, b, *general = recent(parts)
        found = np.concatenate([_block_row(a, b, j) for j in range(start * blocks // rows, -(-stop * blocks // rows))])
        first = start * blocks // rows * (rows // blocks)
        found = found[start - first : stop - first]
        return scaled(found + general[1][start:stop] @ general[0] if hybrid else found, scale)

    yield factored(module.weight, (rows, columns), blocks * r + hybrid, scale, load, rows_of_change)


def _check(module: Module) -> tuple[int, int]:
    """(rows, columns). Raises ModuleProblem where tensors and settings do not go together."""
    a, b = module.shape("a"), module.shape("b")
    blocks, r, hybrid = (module.setting(key) for key in ("gralora_k", "r", "hybrid_r"))
    if len(a) != 3 or len(b) != 3 or 0 in a + b or (a[0], a[2], b[0], b[1]) != (blocks, r, blocks, r) or r % blocks:
        raise ModuleProblem(f"A {a} and B {b} are not {blocks} blocks (gralora_k) of rank {r}")
    rows, columns = b[0] * b[2], a[0] * a[1]
    general = [module.shape(role) for role in ROLES[2:] if role in module]
    expected = [(hybrid, columns), (rows, hybrid)] if hybrid else []
    if general != expected:
        raise ModuleProblem(f"has general factors {general}, and hybrid_r {hybrid} asks for {expected}")
    return rows, columns


def _block_row(a: Floats, b: Floats, j: int) -> Floats:
    """Rows of block row j, (rows / k, columns), without the scale."""
    s = a.shape[2] // len(a)
    return np.concatenate([b[j, n * s : (n + 1) * s].T @ a[n, :, j * s : (j + 1) * s].T for n in range(len(a))], axis=1)


def _spread(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """B (rows, k * r) and A (k * r, columns), a rank (n, j, i) for each block and its own ranks, zero elsewhere."""
    k, inputs, r = a.shape
    s, outputs = r // k, b.shape[2]
    wide_b = np.zeros((k, outputs, k, k, s), np.float32)
    wide_a = np.zeros((k, k, s, k, inputs), np.float32)
    for n in range(k):
        for j in range(k):
            wide_b[j, :, n, j] = b[j, n * s : (n + 1) * s].T
            wide_a[n, j, :, n] = a[n, :, j * s : (j + 1) * s].T
    return wide_b.reshape(k * outputs, k * r), wide_a.reshape(k * r, k * inputs)


METHOD = Method(
    "GraLoRA",
    "arXiv:2505.20355",
    parts={
        ".gralora_A": "a",
        ".gralora_B": "b",
        ".gralora_A_general.weight": "general_a",
        ".gralora_B_general.weight": "general_b",
    },
    read=read,
    needed=("a", "b"),
    settings={"r": rank(32), "hybrid_r": whole(0), "alpha": number(64), "gralora_k": rank(2)},
    free=("fan_in_fan_out", "gralora_dropout", "init_weights"),
)
