"""Thin factors: as near as singular values allow, with the error that is stated, and the same each time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from converters import low_rank
from converters.checkpoint import Floats
from converters.low_rank import EXACT, MAX_RANK, WHOLE, approximate, balanced, leading, shorten

SMALL, LARGE = (48, 80), (WHOLE + 88, WHOLE + 150)  # decomposed as they are; by iteration
CLOSE = 1e-6  # relative, of float32 factors
ENERGY = 1e-6  # of shares of energy, computed from float32 factors


def random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decaying(shape: tuple[int, int], *, slowly: bool = False) -> Floats:
    """Singular values 1, 0.7, 0.49 ... (or 1, 0.97 ...), and none below 1e-3: a tail that no few ranks hold."""
    short = min(shape)
    u, v = (np.linalg.qr(random(size, short, seed=size).astype(np.float64))[0] for size in shape)
    values = np.maximum((0.97 if slowly else 0.7) ** np.arange(short), 1e-3)
    return ((u * values) @ v.T).astype(np.float32)


def left_out(change: Floats, b: Floats, a: Floats) -> float:
    rest = change.astype(np.float64) - b.astype(np.float64) @ a
    return float(np.square(rest).sum() / np.square(change.astype(np.float64)).sum())


def best(change: Floats, rank: int) -> float:
    """The smallest share that any matrix of a rank leaves out (Eckart and Young)."""
    energies = np.square(np.linalg.svd(change.astype(np.float64), compute_uv=False))
    return float(energies[rank:].sum() / energies.sum())


@pytest.mark.parametrize("shape", [SMALL, SMALL[::-1], LARGE, LARGE[::-1]])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_no_matrix_of_the_rank_is_nearer(shape: tuple[int, int], rank: int) -> None:
    change = decaying(shape)
    found = approximate(change, rank=rank, max_error=0.01)
    assert (found.b.shape, found.a.shape, found.rank) == ((shape[0], rank), (rank, shape[1]), rank)
    assert left_out(change, found.b, found.a) == pytest.approx(best(change, rank), abs=ENERGY)
    assert found.residual_energy == pytest.approx(best(change, rank), abs=ENERGY)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("max_error", [0.5, 0.1, 0.05])
def test_the_fewest_ranks_that_meet_an_error(shape: tuple[int, int], max_error: float) -> None:
    change = decaying(shape, slowly=True)
    found = approximate(change, rank=None, max_error=max_error)
    assert found.residual_energy <= max_error**2 < best(change, found.rank - 1)
    assert left_out(change, found.b, found.a) == pytest.approx(found.residual_energy, abs=ENERGY)


def test_what_has_no_few_ranks_is_looked_for_up_to_a_limit() -> None:
    change = random(MAX_RANK + 88, MAX_RANK + 100)
    found = approximate(change, rank=None, max_error=1e-3)
    assert found.rank == MAX_RANK
    assert found.residual_energy > 1e-6
    assert left_out(change, found.b, found.a) == pytest.approx(found.residual_energy, abs=ENERGY)


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("rank", [None, 30])
def test_few_ranks_are_kept_whole(shape: tuple[int, int], rank: int | None) -> None:
    """Where the error would allow fewer, and no more of them where noise has more."""
    change = (random(shape[0], 8) * 0.3 ** np.arange(8, dtype=np.float32)) @ random(8, shape[1], seed=1)
    noisy = change + 1e-8 * np.abs(change).max() * random(*shape, seed=2)
    found = approximate(noisy.astype(np.float32), rank=rank, max_error=0.1)
    assert (found.rank, found.residual_energy) == (8, 0.0)
    assert left_out(change, found.b, found.a) < EXACT**2
    assert approximate(change, rank=2, max_error=0.1).residual_energy > 0.0


def test_nothing_is_one_rank_of_zeros() -> None:
    found = approximate(np.zeros((5, 7), np.float32), rank=None, max_error=0.01)
    assert (found.rank, found.residual_energy, np.abs(found.b @ found.a).max()) == (1, 0.0, 0.0)


def test_one_change_gives_one_file() -> None:
    change = decaying(LARGE, slowly=True)
    one, other = (approximate(change, rank=9, max_error=0.01) for _ in range(2))
    assert (one.b.tobytes(), one.a.tobytes()) == (other.b.tobytes(), other.a.tobytes())


@pytest.mark.parametrize("rank", [1, 3, 8, 12, 40])
def test_shorter_factors_are_those_of_the_product(rank: int) -> None:
    b, a = random(60, 12), random(12, 50, seed=1)
    found = shorten(b, a, rank=rank, max_error=0.01)
    assert found.rank == min(rank, 12)
    assert found.residual_energy == pytest.approx(best(b @ a, rank), abs=ENERGY)
    assert left_out(b @ a, found.b, found.a) == pytest.approx(found.residual_energy, abs=ENERGY)


def test_a_cut_that_keeps_the_first_ranks_would_be_seen() -> None:
    b, a = random(60, 12), random(12, 50, seed=1)
    assert left_out(b @ a, b[:, :3], a[:3]) > best(b @ a, 3) + 100 * ENERGY


def test_balanced_factors_have_the_same_product_and_no_larger_ranks() -> None:
    """As PiSSA's: B @ A - B0 @ A0, each of them 30 times as large as the difference."""
    b, a = random(3, 60, 6), random(3, 6, 50, seed=1)
    moved_b, moved_a = b + 0.03 * random(3, 60, 6, seed=2), a + 0.03 * random(3, 6, 50, seed=3)
    both_b, both_a = np.concatenate((moved_b, -b), axis=-1), np.concatenate((moved_a, a), axis=-2)
    new_b, new_a = balanced(both_b, both_a)
    assert (new_b.shape, new_a.shape) == (both_b.shape, both_a.shape)
    change = moved_b.astype(np.float64) @ moved_a - b.astype(np.float64) @ a
    assert np.linalg.norm(new_b @ new_a - change) < 20 * CLOSE * np.linalg.norm(change)

    def rounded(one: Floats, other: Floats) -> float:
        product = one.astype(np.float16).astype(np.float64) @ other.astype(np.float16).astype(np.float64)
        return float(np.linalg.norm(product - change) / np.linalg.norm(change))

    assert rounded(new_b, new_a) < 5e-4 < 5e-3 < rounded(both_b, both_a)


def test_values_that_are_no_numbers_are_left_to_be_named() -> None:
    b, a = random(8, 2), random(2, 9)
    b[3, 1] = np.nan
    assert np.isnan(balanced(b, a)[0]).any()
    assert np.isnan(shorten(b, a, rank=1, max_error=0.1).b).any()


@pytest.mark.parametrize("shape", [SMALL, LARGE, LARGE[::-1]])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_leading_values_are_exact(shape: tuple[int, int], rank: int) -> None:
    """A random matrix: its values stand close to one another, one in a thousand apart."""
    matrix = random(*shape)
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    wanted = (u[:, :rank] * s[:rank]) @ vt[:rank]
    found = leading(matrix, rank)
    assert np.linalg.norm(found.b.astype(np.float64) @ found.a - wanted) < CLOSE * np.linalg.norm(wanted)


def test_a_few_steps_would_not_find_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "CONVERGED", 1.0)
    matrix = random(*LARGE)
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    wanted = (u[:, :16] * s[:16]) @ vt[:16]
    found = leading(matrix, 16)
    assert np.linalg.norm(found.b.astype(np.float64) @ found.a - wanted) > 100 * CLOSE * np.linalg.norm(wanted)


@pytest.mark.parametrize("size", [64, WHOLE + 40])
def test_equal_values_have_no_largest(size: int) -> None:
    rotation = np.linalg.qr(random(size, size).astype(np.float64))[0].astype(np.float32)
    with pytest.raises(ValueError, match="its 4 largest singular values do not stand apart"):
        leading(rotation, 4)


@pytest.mark.slow
def test_leading_values_of_a_real_layer_take_less_than_all_of_them() -> None:
    """2048x1408, with a spectrum as trained layers have it; measured a fifth of the time of the whole decomposition."""
    u, s, vt = np.linalg.svd(random(2048, 1408).astype(np.float64), full_matrices=False)
    matrix = ((u * (s * (1 + 20 * np.exp(-np.arange(len(s)) / 10)))) @ vt).astype(np.float32)
    started = time.process_time()
    whole = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    between = time.process_time()
    found = leading(matrix, 16)
    wanted = (whole[0][:, :16] * whole[1][:16]) @ whole[2][:16]
    assert np.linalg.norm(found.b.astype(np.float64) @ found.a - wanted) < CLOSE * np.linalg.norm(wanted)
    assert time.process_time() - between < between - started
