"""OFT (arXiv:2306.07280): columns of W turned by rotations, block by block.

    <module>.oft_R.weight            (blocks, size * (size - 1) / 2)   values above the diagonal of each block's Q
    <module>.oft_embedding_R.weight  likewise, of an embedding

The rotation R of a block is Cayley's, (I - Q) @ inverse(I + Q), or the first terms of its series (Cayley-Neumann). A
linear layer turns its input, x @ R, which makes its weight W @ R.T; an embedding turns what it looked up, W @ R.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isqrt

import numpy as np

from converters.checkpoint import Floats
from converters.methods.blocks import Doubles, cayley, skew_symmetric, times_blocks
from converters.methods.changes import Change, ModuleProblem, Shape, Transformed
from converters.methods.factored import recent
from converters.methods.method import Method, Module
from converters.peft_settings import flag, number, rank, whole

MAX_TERMS = 100  # of the series; PEFT's default is 5
SERIES_CHANGED = (0, 18)  # PEFT's version


def read(module: Module) -> Iterator[Change]:
    if len(module.parts) != 1:
        raise ModuleProblem("is a linear layer and an embedding at once")
    (role,) = module.parts
    _check_series(module)
    size, columns = _block_size(module, role), _columns(module, role)
    _check_size(module, size, columns)

    def rotations() -> Floats:
        turned = _rotations(module, role, size)
        return (turned if role == "embedding" else turned.swapaxes(-1, -2)).astype(np.float32)

    shape: Shape = (None, columns)
    yield Transformed(module.weight, shape, lambda rows, start: times_blocks(rows, recent(rotations)))


def _check_series(module: Module) -> None:
    if "oft_block_size" not in module.config.values:
        raise ModuleProblem("was trained by a PEFT before 0.15, whose OFT was another one")
    if not module.setting("use_cayley_neumann"):
        return
    if (terms := module.setting("num_cayley_neumann_terms")) > MAX_TERMS:
        raise ModuleProblem(f"has a series of {terms} terms; {MAX_TERMS} are the most here")
    version = re.match(r"(\d{1,4})\.(\d{1,4})", str(module.config.values.get("peft_version")))
    if version is None or (int(version[1]), int(version[2])) < SERIES_CHANGED:
        raise ModuleProblem("its series (use_cayley_neumann) is another one since PEFT 0.18, which did not save this")


def _block_size(module: Module, role: str) -> int:
    """size from size * (size - 1) / 2."""
    module.check(role, None, None)
    values = module.shape(role)[1]
    size = (1 + isqrt(1 + 8 * values)) // 2
    if size * (size - 1) // 2 != values:
        raise ModuleProblem(f"{values} values are not the upper half of a square block")
    return size


def _columns(module: Module, role: str) -> int | None:
    """What is turned: as many as the blocks cover, or what one shared block is repeated over."""
    blocks = module.shape(role)[0]
    if not module.setting("block_share"):
        return blocks * _block_size(module, role)
    if blocks != 1:
        raise ModuleProblem(f"has {blocks} blocks, and block_share means one")
    shape = module.shape_in_base(module.weight)
    return shape[-1] if shape else None


def _check_size(module: Module, size: int, columns: int | None) -> None:
    """Raises ModuleProblem where the settings give other blocks."""
    r, wanted = module.setting("r"), module.setting("oft_block_size")
    if bool(r) == bool(wanted):
        raise ModuleProblem(f"r is {r} and oft_block_size {wanted}; one of them is 0 and says nothing")
    if columns is None:
        return
    expected = columns // nearest_divisor(columns, r) if r else nearest_divisor(columns, wanted)
    if size != expected:
        raise ModuleProblem(f"its blocks have size {size}, {module.config.path.name} makes it {expected}")


def nearest_divisor(columns: int, given: int) -> int:
    """The divisor of `columns` that PEFT takes for another number (`adjust_oft_parameters`)."""
    if given >= columns:
        return columns
    higher = next(number for number in range(given, columns + 1) if columns % number == 0)
    lower = next(number for number in range(given, 0, -1) if columns % number == 0)
    return lower if given - lower <= higher - given else higher


def _rotations(module: Module, role: str, size: int) -> Doubles:
    """(blocks, size, size)."""
    skew = skew_symmetric(module.load(role), size)
    if module.setting("coft"):
        skew = _within(skew, module.setting("eps"))
    if not module.setting("use_cayley_neumann"):
        return cayley(skew)
    return series(skew, module.setting("num_cayley_neumann_terms"))


def _within(skew: Doubles, eps: float) -> Doubles:
    """Constrained OFT: no block's norm is above eps / sqrt(blocks)."""
    most = eps / np.sqrt(len(skew))
    norm = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
    return np.where(norm <= most, skew, most * skew / np.where(norm == 0, 1, norm))


def series(skew: Doubles, terms: int) -> Doubles:
    """I + 2Q + 2Q^2 + ... + Q^(terms - 1), the last one once; of three terms PEFT makes four."""
    result = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    if terms == 1:
        return result
    result += 2 * skew
    if terms == 2:
        return result
    power = skew @ skew
    result += 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        result += 2 * power
    return np.asarray(result + power @ skew)


METHOD = Method(
    "OFT",
    "arXiv:2306.07280",
    parts={".oft_R.weight": "linear", ".oft_embedding_R.weight": "embedding"},
    read=read,
    settings={
        "r": whole(0),
        "oft_block_size": whole(32),
        "block_share": flag(False),
        "coft": flag(False),
        "eps": number(6e-5),
        "use_cayley_neumann": flag(True),
        "num_cayley_neumann_terms": rank(5),
    },
    free=("fan_in_fan_out", "init_weights", "module_dropout"),
)
