"""Rotations in blocks along the diagonal, which OFT and BOFT turn the columns of a weight with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from converters.checkpoint import Floats

Doubles = npt.NDArray[np.float64]


def cayley(skew: Doubles) -> Doubles:
    """(I - Q) @ inverse(I + Q) of skew-symmetric matrices (blocks, size, size): rotations."""
    identity = np.eye(skew.shape[-1])
    try:  # X @ (I + Q) = I - Q, turned round; the transpose of I + Q is I - Q
        return np.asarray(np.linalg.solve(identity - skew, identity + skew).swapaxes(-1, -2), np.float64)
    except np.linalg.LinAlgError:  # only values beyond any precision do that; NaN is refused by name
        return np.full_like(skew, np.nan)


def skew_symmetric(upper: Floats, size: int) -> Doubles:
    """Matrices (blocks, size, size) of their values above the diagonal, (blocks, size * (size - 1) / 2) row by row."""
    matrices = np.zeros((len(upper), size, size))
    rows, columns = np.triu_indices(size, 1)
    matrices[:, rows, columns] = upper
    matrices[:, columns, rows] = -upper
    return matrices


def times_blocks(rows: Floats, blocks: npt.NDArray[Any]) -> Floats:
    """`rows` (n, columns) times a matrix of blocks (columns / size, size, size), or of one block (1, size, size)."""
    size = blocks.shape[-1]
    apart = rows.reshape(len(rows), -1, size).swapaxes(0, 1)
    return np.ascontiguousarray((apart @ blocks).swapaxes(0, 1)).reshape(rows.shape)
