"""What sums and cuts of approximated changes leave out is never more than they say."""

from __future__ import annotations

from dataclasses import replace
from math import inf, sqrt

import numpy as np
import pytest

from converters.checkpoint import Floats
from converters.low_rank import approximate, norm_of_product
from converters.pairs import Pair, blended, shortened

ROWS, COLUMNS = 24, 20


def change(seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def pair_of(values: Floats, rank: int) -> Pair:
    found = approximate(values, rank=rank, max_error=1.0)
    return Pair("blk.0.attn_q.weight", values.shape, rank, lambda: (found.b, found.a), (1.0,), found.residual_energy)


def left_out(values: Floats, pair: Pair) -> float:
    b, a = pair.load()
    return float(np.linalg.norm(values - b @ a) / np.linalg.norm(values))


def stated(pair: Pair) -> float:
    return sqrt(pair.residual_energy)


@pytest.mark.parametrize("near", [1.0, 0.5, 0.3])
def test_a_difference_of_near_adapters_leaves_out_more_than_either(near: float) -> None:
    first, other = change(0), change(0) + near * change(1)
    parts = [(pair_of(first, 19), 0.7), (pair_of(other, 19), -0.7)]
    both = blended(parts)
    true = left_out(np.float32(0.7) * (first - other), both)
    assert max(stated(pair) for pair, _ in parts) < true <= stated(both) < 1.0


def test_a_sum_is_bounded_and_not_by_much_more() -> None:
    parts = [(pair_of(change(seed), 17), weight) for seed, weight in ((0, 1.0), (1, -0.5), (2, 0.0))]
    both = blended(parts)
    true = left_out(change(0) - np.float32(0.5) * change(1), both)
    assert true <= stated(both) < 3 * true


def test_a_sum_of_sums_and_cuts_is_bounded() -> None:
    """What a sum says of itself is enough for the next one."""
    first = shortened(blended([(pair_of(change(0), 18), 1.0), (pair_of(change(1), 18), 0.5)]), rank=19, max_error=1.0)
    both = blended([(first, 1.0), (pair_of(change(2), 17), 1.0)])
    true = left_out(change(0) + np.float32(0.5) * change(1) + change(2), both)
    assert true <= stated(both) < 1.0


def test_one_part_and_exact_ones_say_what_they_said() -> None:
    pair = pair_of(change(0), 12)
    assert blended([(pair, -3.0)]).residual_energy == pair.residual_energy > 0.0
    exact = replace(pair, residual_energy=0.0)
    assert blended([(exact, 1.0), (exact, -1.0)]).residual_energy == 0.0
    assert blended([(exact, 1.0), (pair, 0.0)]).residual_energy == 0.0


def test_what_cancels_is_not_bounded() -> None:
    pair = pair_of(change(0), 12)
    assert blended([(pair, 1.0), (pair, -1.0)]).residual_energy == inf
    assert blended([(pair, 1.0), (replace(pair, residual_energy=1.5), 1.0)]).residual_energy == inf


@pytest.mark.parametrize("rank", [14, 8, 3])
def test_a_cut_adds_to_what_was_left_out_before(rank: int) -> None:
    values, twice = change(0), pair_of(change(0), 15)
    cut = shortened(twice, rank=rank, max_error=1.0)
    assert stated(twice) < left_out(values, cut) <= stated(cut)
    once = shortened(replace(twice, residual_energy=0.0), rank=rank, max_error=1.0)
    b, a = twice.load()
    assert left_out(b @ a, once) == pytest.approx(stated(once), rel=1e-4)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_the_norm_of_a_product(stack: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    b, a = (rng.standard_normal((*stack, *shape)).astype(np.float32) for shape in ((9, 4), (4, 7)))
    assert norm_of_product(b, a) == pytest.approx(float(np.linalg.norm(b @ a)), rel=1e-5)
    assert norm_of_product(np.concatenate((b, b), -1), np.concatenate((a, -a), -2)) < 1e-6
