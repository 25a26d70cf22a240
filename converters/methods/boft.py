"""BOFT (arXiv:2311.06243): columns of W turned by a product of rotations in blocks, and a factor for each row.

    <module>.boft_R  (factors, blocks, size, size)   each block's rotation is Cayley's of (R - R.T) / 2
    <module>.boft_s  (rows, 1)

W becomes s * (W @ M.T), M = P1 B1 P1.T @ P0 B0 P0.T of the rotations B and PEFT's permutations P, which bring columns
of different blocks together; there is more than one factor only where PEFT's CUDA extension was there for the training.
The bias stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from converters.checkpoint import Floats
from converters.methods.blocks import cayley, times_blocks
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import recent
from converters.methods.method import Method, Module
from converters.peft_settings import rank, whole


def read(module: Module) -> Iterator[Change]:
    factors, blocks, size = _sizes(module)
    module.check("scale", None, 1)
    columns = blocks * size
    orders = [permutation(columns, size, factor) for factor in range(factors)]

    def rotations() -> Floats:
        stored = module.load("rotations").reshape(-1, size, size).astype(np.float64)
        turned = cayley((stored - stored.swapaxes(1, 2)) / 2).swapaxes(1, 2)
        return turned.reshape(factors, blocks, size, size).astype(np.float32)

    def apply(rows: Floats, start: int) -> Floats:
        for order, of_factor in zip(orders, recent(rotations), strict=True):
            inverse = np.argsort(order)
            rows = times_blocks(rows[:, inverse], of_factor)[:, order]
        return rows * module.rows("scale", start, start + len(rows))

    yield Transformed(module.weight, (module.shape("scale")[0], columns), apply)


def _sizes(module: Module) -> tuple[int, int, int]:
    """Factors, blocks and their size; raises ModuleProblem where PEFT could not have made them of the settings."""
    module.check("rotations", None, None, None, None)
    factors, blocks, size, other = module.shape("rotations")
    wanted_size, wanted_blocks = module.setting("boft_block_size"), module.setting("boft_block_num")
    wanted = module.setting("boft_n_butterfly_factor")
    found = f"has {factors} x {blocks} blocks of {size} x {other}"
    if size != other:
        raise ModuleProblem(f"{found}, which are not square")
    if bool(wanted_size) == bool(wanted_blocks) or size != (wanted_size or size) or blocks != (wanted_blocks or blocks):
        raise ModuleProblem(f"{found}; boft_block_size is {wanted_size}, boft_block_num {wanted_blocks}, one of them 0")
    if factors not in (1, wanted):  # one, too, where PEFT had no CUDA extension
        raise ModuleProblem(f"{found}, boft_n_butterfly_factor is {wanted}")
    if factors > 1 and (size % 2 or factors > 60 or blocks % 2 ** (factors - 1)):
        raise ModuleProblem(f"{found}, which no {factors} factors of a butterfly can have")
    return factors, blocks, size


def permutation(columns: int, size: int, factor: int) -> npt.NDArray[np.int64]:
    """PEFT's order of columns for a factor (`block_butterfly_perm`): in each run of size * 2^factor, halves of blocks
    with an even number come before those with an odd one."""
    order = np.arange(columns, dtype=np.int64)
    if factor == 0:
        return order
    halves = order.reshape(-1, 2 ** (factor + 1), size // 2)
    return np.concatenate([halves[:, 0::2], halves[:, 1::2]], axis=1).reshape(-1)


METHOD = Method(
    "BOFT",
    "arXiv:2311.06243",
    parts={".boft_R": "rotations", ".boft_s": "scale"},
    needed=("rotations", "scale"),
    read=read,
    settings={
        "boft_block_size": whole(4),
        "boft_block_num": whole(0),
        "boft_n_butterfly_factor": rank(1),
    },
    free=("boft_dropout", "fan_in_fan_out", "init_weights"),
)
