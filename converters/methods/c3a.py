"""C3A (arXiv:2407.19342): W + circulant blocks / columns.

    <module>.c3a_kernel  (rows / block, columns / block, block)

In block (m, n), row p has kernel[m, n] turned by p to the right: its column q is kernel[m, n, (q - p) mod block].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, Transformed
from converters.methods.factored import quiet
from converters.methods.method import Method, Module


def read(module: Module) -> Iterator[Change]:
    module.check("kernel", None, None, None)
    down, across, block = module.shape("kernel")

    @quiet
    def apply(weight: Floats, start: int) -> Floats:
        return weight + _circulant(module.load("kernel"), start, len(weight)) / np.float32(across * block)

    yield Transformed(module.weight, (down * block, across * block), apply, uses_weight=False)


def _circulant(kernel: Floats, start: int, count: int) -> Floats:
    """Some rows of the matrix, (count, columns)."""
    _, across, block = kernel.shape
    which, turned = np.divmod(np.arange(start, start + count), block)
    places = (np.arange(block) - turned[:, None]) % block
    rows = np.take_along_axis(kernel[which], places[:, None, :], axis=2)
    return rows.reshape(count, across * block)


METHOD = Method(
    "C3A",
    "arXiv:2407.19342",
    parts={".c3a_kernel": "kernel"},
    read=read,
    free=("block_size", "block_size_pattern", "init_weights"),
)
