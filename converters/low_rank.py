"""Thin factors of a change: B @ A, cut to fewer ranks, or found for a change that has no factors of its own.

The best approximation of a given rank keeps the largest singular values (Eckart and Young, 1936); what it leaves out
is the energy of the others. Factors of large matrices are found by block power iteration (Halko, Martinsson and Tropp,
arXiv:0909.4061), whose error is measured against the matrix itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.checkpoint import Floats

Doubles = npt.NDArray[np.float64]
WHOLE = 512  # matrices whose shorter side is at most this are decomposed as they are
MAX_RANK = 512  # that is looked for in larger ones: an adapter of that rank is as slow as another model
FIRST_RANK, OVERSAMPLING, ITERATIONS = 64, 16, 4
MORE_OVERSAMPLING, MAX_ITERATIONS = 64, 50  # where the result must be exact
CONVERGED = 1e-11  # sum of squared sines between two subspaces


@dataclass(frozen=True)
class Approximation:
    """B (rows, rank) and A (rank, columns) in float32, and the share of the change's energy that they leave out."""

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
        rank: how many; None takes the fewest that meet `max_error`, or all that are looked for.
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
    """B @ A with fewer ranks: `rank`, or the fewest that meet `max_error`. Without building the product."""
    (qb, rb), (qa, ra) = np.linalg.qr(b.astype(np.float64)), np.linalg.qr(a.astype(np.float64).T)
    u, s, vt = np.linalg.svd(rb @ ra.T)
    energy = float((s * s).sum())
    if energy == 0.0:
        return Approximation(b[:, :1], a[:1], 0.0)
    return _cut(qb @ u, s, vt @ qa.T, energy, rank, max_error)


def leading(matrix: Floats, rank: int) -> Approximation:
    """The `rank` largest singular values of a matrix, converged: what was taken out of it can be put back exactly.

    Raises:
        ValueError: they do not converge: the value after the last is as large as it, and no part is the largest.
    """
    energy = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    if min(matrix.shape) <= WHOLE:
        u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        return _cut(u, s, vt, energy, rank, 0.0)
    count = min(rank + MORE_OVERSAMPLING, min(matrix.shape))
    exact = matrix.astype(np.float64)
    q = np.linalg.qr(exact @ _start(matrix.shape[1], count))[0]
    before = q[:, :rank]
    for _ in range(MAX_ITERATIONS):
        for _ in range(ITERATIONS):
            q = np.linalg.qr(exact @ np.linalg.qr(exact.T @ q)[0])[0]
        u, s, vt = np.linalg.svd(q.T @ exact, full_matrices=False)
        now = (q @ u)[:, :rank]
        if rank - float((np.square(before.T @ now)).sum()) < CONVERGED:
            return _cut(q @ u, s, vt, energy, rank, 0.0)
        before = now
    raise ValueError(f"its {rank} largest singular values do not stand apart from the others")


def _cut(u: Doubles, s: Doubles, vt: Doubles, energy: float, rank: int | None, max_error: float) -> Approximation:
    left = np.maximum(0.0, 1.0 - np.cumsum(s * s) / energy)  # by the number of ranks kept, less one
    if rank is None:
        enough = np.flatnonzero(left <= max_error * max_error)
        rank = int(enough[0]) + 1 if len(enough) else len(s)
    rank = min(rank, len(s))
    root = np.sqrt(s[:rank])
    b, a = (u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32)
    return Approximation(np.ascontiguousarray(b), np.ascontiguousarray(a), float(left[rank - 1]))


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
    """Block power iteration from a fixed start, so that one adapter always gives one file."""
    q = np.linalg.qr(change @ _start(change.shape[1], count).astype(np.float32))[0]
    for _ in range(ITERATIONS):
        q = np.linalg.qr(change.T @ q)[0]
        q = np.linalg.qr(change @ q)[0]
    small: npt.NDArray[Any] = q.T @ change
    u, s, vt = np.linalg.svd(small.astype(np.float64), full_matrices=False)
    return q.astype(np.float64) @ u, s, vt


def _start(rows: int, columns: int) -> Doubles:
    return np.random.default_rng(0).standard_normal((rows, columns))
