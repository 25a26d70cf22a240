"""Thin factors of a change: B @ A, cut to fewer ranks, or found for a change that has no factors of its own.

The best approximation of a given rank keeps the largest singular values (Eckart and Young, 1936); what it leaves out
is the energy of the others. Factors of large matrices are found by block power iteration (Halko, Martinsson and Tropp,
arXiv:0909.4061), whose error is measured against the matrix itself; where they must be exact, by block Krylov iteration
(Musco and Musco, arXiv:1504.05477), begun again from the best vectors until these stand still.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.checkpoint import Floats

Doubles = npt.NDArray[np.float64]
WHOLE = 512  # matrices whose shorter side is at most this are decomposed as they are
MAX_RANK = 512  # that is looked for in larger ones: an adapter of that rank is as slow as another model
FIRST_RANK, OVERSAMPLING, ITERATIONS = 64, 16, 4
DEPTH, MAX_CYCLES = 6, 60  # of block Krylov iteration
CONVERGED = 1e-11  # sum of squared sines between two subspaces
APART = 1e-6  # of the largest singular value: nearer ones are the same in float32, and so are their vectors
TOO_CLOSE = "its {} largest singular values do not stand apart from the others"
CHUNK = 1 << 22  # values that are float64 at a time
EXACT = 1e-4  # |change - B @ A| / |change| that counts as none: half of what storing A and B in F16 does
FEW = 4  # a change has few ranks of its own, if no more than its shorter side divided by this


@dataclass(frozen=True)
class Approximation:
    """B (rows, rank) and A (rank, columns) in float32, and the share of the change's energy that they leave out.

    The share is 0 where it is below `EXACT` squared.
    """

    b: Floats
    a: Floats
    residual_energy: float

    @property
    def rank(self) -> int:
        return len(self.a)


def approximate(change: Floats, *, rank: int | None, max_error: float) -> Approximation:
    """The best factors of a change.

    Args:
        change: float32 (rows, columns).
        rank: at most so many. None takes all of a change that has few ranks of its own; otherwise the fewest that meet
            `max_error`, or all that are looked for.
        max_error: |change - B @ A| / |change|, in Frobenius norms.
    """
    energy = float(np.einsum("ij,ij->", change, change, dtype=np.float64))
    if energy == 0.0:
        return Approximation(np.zeros((len(change), 1), np.float32), np.zeros((1, change.shape[1]), np.float32), 0.0)
    if min(change.shape) <= WHOLE:
        u, s, vt = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    else:
        u, s, vt = _leading(change, rank, energy, max_error)
    return _cut(u, s, vt, energy, rank, max_error)


def shorten(b: Floats, a: Floats, *, rank: int | None, max_error: float) -> Approximation:
    """B @ A with fewer ranks: `rank`, or the fewest that meet `max_error`. Without building the product.

    As it is, where it holds NaN or infinite values.
    """
    if not (np.isfinite(b).all() and np.isfinite(a).all()):
        return Approximation(b, a, 0.0)
    (qb, rb), (qa, ra) = np.linalg.qr(b.astype(np.float64)), np.linalg.qr(a.astype(np.float64).T)
    u, s, vt = np.linalg.svd(rb @ ra.T)
    energy = float((s * s).sum())
    if energy == 0.0:
        return Approximation(b[:, :1], a[:1], 0.0)
    return _cut(qb @ u, s, vt @ qa.T, energy, rank, max_error)


def balanced(b: Floats, a: Floats) -> tuple[Floats, Floats]:
    """Other factors of B @ A, of the same rank and as large as the product: rounding them is rounding it.

    Args:
        b: (rows, rank), or a stack of such; as it is where it holds NaN or infinite values, and `a` likewise.
    """
    if not (np.isfinite(b).all() and np.isfinite(a).all()):
        return b, a
    (qb, rb), (qa, ra) = np.linalg.qr(b.astype(np.float64)), np.linalg.qr(_turned(a.astype(np.float64)))
    u, s, vt = np.linalg.svd(rb @ _turned(ra), full_matrices=False)
    root, count = np.sqrt(s), s.shape[-1]
    new_b, new_a = np.zeros_like(b), np.zeros_like(a)
    new_b[..., :count], new_a[..., :count, :] = qb @ (u * root[..., None, :]), (root[..., None] * vt) @ _turned(qa)
    return new_b, new_a


def norm_of_product(b: Floats, a: Floats) -> float:
    """The Frobenius norm of B @ A, without building it; of stacks, of all their products together.

    Args:
        b: (rows, rank), or a stack of such, and `a` (rank, columns) likewise.
    """
    rb = np.linalg.qr(b.astype(np.float64))[1]
    ra = np.linalg.qr(_turned(a.astype(np.float64)))[1]
    return float(np.linalg.norm(rb @ _turned(ra)))


def _turned(matrices: Doubles) -> Doubles:
    return np.swapaxes(matrices, -1, -2)


def leading(matrix: Floats, rank: int) -> Approximation:
    """The `rank` largest singular values of a matrix, converged: what was taken out of it can be put back exactly.

    Raises:
        ValueError: the value after the last is as large as it, and no part is the largest.
    """
    energy = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    if min(matrix.shape) <= WHOLE:
        u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        return _largest(u, s, vt, energy, rank)
    count = min(rank + OVERSAMPLING, min(matrix.shape))
    v = np.linalg.qr(_start(matrix.shape[1], count))[0]
    before = v[:, :rank]
    for _ in range(MAX_CYCLES):
        u, s, v = _krylov_cycle(matrix, v)
        now = v[:, :rank]
        if len(now.T) - float(np.square(before.T @ now).sum()) < CONVERGED:
            return _largest(u, s, v.T, energy, rank)
        before = now
    raise ValueError(TOO_CLOSE.format(rank))


def _largest(u: Doubles, s: Doubles, vt: Doubles, energy: float, rank: int) -> Approximation:
    if rank < len(s) and s[rank - 1] - s[rank] <= APART * s[0]:
        raise ValueError(TOO_CLOSE.format(rank))
    return _factors(u, s, vt, energy, min(rank, len(s)))


def _krylov_cycle(matrix: Floats, v: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Better right singular vectors (columns, n), with the left ones and the values, from a first guess."""
    basis, image = v, _times(matrix, v)
    block = image
    for _ in range(DEPTH - 1):
        more = _transposed_times(matrix, block)
        for _ in range(2):  # once is not enough in finite precision
            more -= basis @ (basis.T @ more)
        more = np.linalg.qr(more)[0]
        block = _times(matrix, more)
        basis, image = np.concatenate((basis, more), axis=1), np.concatenate((image, block), axis=1)
        if basis.shape[1] + v.shape[1] > min(matrix.shape):
            break
    q, r = np.linalg.qr(image)
    u, s, vt = np.linalg.svd(r)
    count = v.shape[1]
    return q @ u[:, :count], s[:count], basis @ vt[:count].T


def _times(matrix: Floats, v: Doubles) -> Doubles:
    """In float64, without a copy of the whole matrix in it."""
    return np.concatenate([rows.astype(np.float64) @ v for _, rows in _chunks(matrix)])


def _transposed_times(matrix: Floats, u: Doubles) -> Doubles:
    total = np.zeros((matrix.shape[1], u.shape[1]))
    for start, rows in _chunks(matrix):
        total += rows.astype(np.float64).T @ u[start : start + len(rows)]
    return total


def _chunks(matrix: Floats) -> Iterator[tuple[int, Floats]]:
    step = max(1, CHUNK // matrix.shape[1])
    yield from ((start, matrix[start : start + step]) for start in range(0, len(matrix), step))


def _cut(u: Doubles, s: Doubles, vt: Doubles, energy: float, rank: int | None, max_error: float) -> Approximation:
    left = np.maximum(0.0, 1.0 - np.cumsum(s * s) / energy)  # by the number of ranks kept, less one
    exact, enough = _first(left, EXACT), _first(left, max_error) or len(left)
    if rank is not None:
        count = min(rank, exact or len(left))
    else:
        few = min(u.shape[0], vt.shape[1]) // FEW
        count = max(exact, enough) if exact is not None and exact <= few else enough
    return _factors(u, s, vt, energy, count)


def _first(left: Doubles, error: float) -> int | None:
    """The fewest ranks that meet an error."""
    found = np.flatnonzero(left <= error * error)
    return int(found[0]) + 1 if len(found) else None


def _factors(u: Doubles, s: Doubles, vt: Doubles, energy: float, rank: int) -> Approximation:
    root = np.sqrt(s[:rank])
    b, a = (u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32)
    left = max(0.0, 1.0 - float((s[:rank] ** 2).sum()) / energy)
    return Approximation(np.ascontiguousarray(b), np.ascontiguousarray(a), left if left > EXACT * EXACT else 0.0)


def _leading(change: Floats, rank: int | None, energy: float, max_error: float) -> tuple[Doubles, Doubles, Doubles]:
    """The largest singular values and their vectors: `rank` of them, or as many as the error asks for."""
    count = min(rank or FIRST_RANK, MAX_RANK, min(change.shape))
    while True:
        u, s, vt = _range_of(change, min(count + OVERSAMPLING, min(change.shape)))
        is_enough = 1.0 - float((s[:count] ** 2).sum()) / energy <= max_error * max_error
        if rank is not None or is_enough or count >= min(MAX_RANK, *change.shape):
            return u[:, :count], s[:count], vt[:count]
        count = min(2 * count, MAX_RANK, *change.shape)


def _range_of(change: Floats, count: int) -> tuple[Doubles, Doubles, Doubles]:
    """Block power iteration from a fixed start, so that one adapter always gives one file.

    The last product is in float64: what is left out is the small difference of two energies.
    """
    q = np.linalg.qr(change @ _start(change.shape[1], count).astype(np.float32))[0]
    for _ in range(ITERATIONS):
        q = np.linalg.qr(change.T @ q)[0]
        q = np.linalg.qr(change @ q)[0]
    exact = np.linalg.qr(q.astype(np.float64))[0]
    u, s, vt = np.linalg.svd(_transposed_times(change, exact).T, full_matrices=False)
    return exact @ u, s, vt


def _start(rows: int, columns: int) -> Doubles:
    return np.random.default_rng(0).standard_normal((rows, columns))
