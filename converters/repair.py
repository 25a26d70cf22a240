"""Ranks that give a quantized base back a part of what quantization took from it.

E = W - Q is what a weight W lost when it became Q. The best B @ A of so many ranks, in the sense of what the layer's
outputs lose, keeps the largest singular values of E @ D, where D = diag(sqrt(mean(x * x))) is how strongly each column
is used: B @ A = svd(E @ D) @ D^-1. Without an importance matrix D is the identity, and only the weights' error counts.

LQER (Zhang et al., arXiv:2402.02446) scales columns so and serves the two factors beside the quantized weight; QERA
(Zhang et al., arXiv:2410.06040, section 3.3) derives the root of the mean square as the best diagonal. The ranks stand
beside those of an adapter, at no other cost than a higher rank. They belong to those very weights: on another
quantization they would add its error to the other's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from converters.adapted_base import AdaptedBase, open_base
from converters.adapter import AdapterOptions, PreparedAdapter, prepared_pairs
from converters.base_file import read_base_header
from converters.block_types import PLAIN
from converters.checkpoint import Floats
from converters.errors import BaseMismatchError, FormatError, UnsupportedError, listed
from converters.gguf_adapter import open_gguf_adapter
from converters.imatrix import ImportanceMatrix
from converters.low_rank import approximate
from converters.pairs import Pair, blended
from converters.quant_types import TYPES, tensor_order
from converters.reader import GGUFHeader
from converters.writer import TensorSpec

REPAIR = "edgelora.repair"
"""JSON: `base`, the hash of the repaired weights; `ranks`, by GGUF name, how many of a tensor's last ones repair it."""
SAMPLE_BYTES = 4096  # of each tensor, from its middle: what tells two quantizations apart is everywhere
LEAST_USE = 1e-3  # of the mean use of a tensor's columns: one that calibration never saw is not divided by nothing


@dataclass(frozen=True)
class Repair:
    """The ranks of every repaired tensor.

    Attributes:
        base_weights: see `weights_hash`.
        error_before, error_after: the norm of E @ D over all tensors, and of what the ranks leave of it.
    """

    pairs: tuple[Pair, ...]
    base_weights: str
    rank: int
    is_weighted: bool
    error_before: float
    error_after: float

    @property
    def share(self) -> float:
        """How much of the error's energy the ranks hold."""
        return 1.0 - (self.error_after / self.error_before) ** 2 if self.error_before else 0.0

    def metadata(self) -> dict[str, Any]:
        """What the adapter's contract says of it."""
        return {
            "base": self.base_weights,
            "rank": self.rank,
            "weighted": self.is_weighted,
            "share": round(self.share, 6),
            "ranks": {pair.tensor: pair.rank for pair in self.pairs},
        }


def repairable(header: GGUFHeader) -> list[str]:
    """Quantized matrices of the layers, in the file's usual order; stacks of experts and what lies outside the layers
    stay as they are."""
    found = [name for name, each in header.tensors.items() if _is_repairable(name, each.shape, each.type_name)]
    return sorted(found, key=tensor_order)


def _is_repairable(name: str, shape: tuple[int, ...], type_name: str) -> bool:
    is_matrix = name.startswith("blk.") and name.endswith(".weight") and len(shape) == 2
    return is_matrix and type_name not in PLAIN


def planned_bytes(specs: Iterable[TensorSpec], rank: int, dtype: str) -> int:
    """What a repair adds to an adapter, beside names and padding; 0 for a base of which nothing is quantized.

    Less where fewer ranks hold the whole error.

    Args:
        specs: the base's tensors.
        dtype: of the adapter's.
    """
    shapes = [each.shape for each in specs if _is_repairable(each.name, each.shape, each.block_type.name)]
    return TYPES[dtype.upper()].row_bytes(sum(min(rank, *shape) * sum(shape) for shape in shapes))


def weights_hash(header: GGUFHeader, names: Iterable[str]) -> str:
    """A hash of types, shapes and samples of a base's tensors: equal wherever these very weights lie, also in a bundle.

    Raises:
        FormatError: the base has no tensor of that name.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        if name not in header.tensors:
            raise FormatError(f"{header.path}: has no {name}")
        tensor = header.tensors[name]
        digest.update(f"{name} {tensor.type_name} {tensor.shape}".encode())
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset + max(0, tensor.size_bytes - SAMPLE_BYTES) // 2)
            digest.update(file.read(min(SAMPLE_BYTES, tensor.size_bytes)))
    return digest.hexdigest()


def find_repair(
    base: Path,
    reference: Path,
    rank: int,
    imatrix: ImportanceMatrix | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Repair:
    """The ranks that hold most of what quantization took from a base; one tensor at a time is in memory.

    Args:
        base: a quantized GGUF base.
        reference: the same base before: its Hugging Face folder, or an unquantized GGUF.
        rank: of each tensor's repair, 1 or more.
        imatrix: how strongly the columns are used; None for all alike.
        progress: called with tensors done, tensors in all, and the tensor.

    Raises:
        UnsupportedError: nothing in the base is quantized, or the reference is itself.
        BaseMismatchError: the reference is another model.
        ConversionError: files that cannot be read.
    """
    header = read_base_header(base)
    names = repairable(header)
    if not names:
        raise UnsupportedError(f"{base}: has no quantized matrices in its layers: there is nothing to repair")
    pairs, before, after = list[Pair](), 0.0, 0.0
    with open_base(base) as quantized, open_base(reference) as original:
        _check(quantized, original, names)
        for number, name in enumerate(names):
            pair, energy, left = _repaired(name, quantized, original, rank, imatrix)
            pairs.append(pair)
            before, after = before + energy, after + left
            if progress:
                progress(number + 1, len(names), name)
    return Repair(tuple(pairs), weights_hash(header, names), rank, imatrix is not None, sqrt(before), sqrt(after))


def _check(quantized: AdaptedBase, original: AdaptedBase, names: Iterable[str]) -> None:
    if original.is_lossy:
        raise UnsupportedError(
            f"{original.path}: was quantized itself",
            hint="Give the model's Hugging Face folder with --repair-reference.",
        )
    if quantized.fingerprint != original.fingerprint:
        raise BaseMismatchError(
            f"{quantized.path} (fingerprint {quantized.fingerprint[:12]}) was not made of {original.path} (fingerprint "
            f"{original.fingerprint[:12]})"
        )
    odd = [name for name in names if original.shapes.get(name) != quantized.shapes[name]]
    if odd:
        raise BaseMismatchError(f"{original.path}: holds other tensors than {quantized.path}:{listed(odd)}")


def _repaired(
    name: str, quantized: AdaptedBase, original: AdaptedBase, rank: int, imatrix: ImportanceMatrix | None
) -> tuple[Pair, float, float]:
    """The ranks of one tensor, the energy of its weighted error, and what they leave of it."""
    shape = quantized.shapes[name]
    error = original.rows(name, 0, shape[0]) - quantized.rows(name, 0, shape[0])
    use = _use(name, shape[1], imatrix)
    error *= use
    energy = float(np.einsum("ij,ij->", error, error, dtype=np.float64))
    found = approximate(error, rank=min(rank, *shape), max_error=0.0)
    b, a = found.b, found.a / use
    return Pair(name, shape, len(a), lambda: (b, a), (1.0,)), energy, energy * found.residual_energy


def _use(name: str, n_cols: int, imatrix: ImportanceMatrix | None) -> Floats:
    """The diagonal of D, float32 (n_cols,)."""
    means = imatrix.means_for(name, n_cols) if imatrix else None
    if means is None:
        return np.ones(n_cols, np.float32)
    use = np.sqrt(means[0].astype(np.float64))
    floor = LEAST_USE * float(use.mean())
    return np.maximum(use, floor).astype(np.float32) if floor > 0.0 else np.ones(n_cols, np.float32)


@contextmanager
def prepare_repaired(adapter: Path, base: Path, repair: Repair, options: AdapterOptions) -> Iterator[PreparedAdapter]:
    """A GGUF adapter with the repair's ranks beside its own.

    Raises:
        UnsupportedError: it repairs a base already.
        ConversionError: it cannot be read, or the ranks cannot be stored.
    """
    with open_gguf_adapter(adapter) as read, open_base(base) as opened:
        if REPAIR in read.keys:
            raise UnsupportedError(f"{adapter}: repairs a base already", hint="Give the adapter as it was trained.")
        own, added = ({pair.tensor: pair for pair in pairs} for pairs in (read.pairs, repair.pairs))
        yield prepared_pairs(
            adapter,
            read.header.architecture,
            [_beside(own.get(name), added.get(name)) for name in {**own, **added}],
            options,
            keys={**read.keys, REPAIR: json.dumps(repair.metadata(), sort_keys=True)},
            inputs=(adapter, *read_base_header(base).files),
            method="LoRA",
            base_name=opened.name,
            base_fingerprint=opened.fingerprint,
            is_approximate=any(pair.residual_energy for pair in read.pairs),
        )


def _beside(own: Pair | None, added: Pair | None) -> Pair:
    """The ranks of an adapter first, then those of the repair."""
    parts = [pair for pair in (own, added) if pair is not None]
    return parts[0] if len(parts) == 1 else blended([(pair, 1.0) for pair in parts])
