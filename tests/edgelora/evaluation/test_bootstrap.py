"""Intervals, against closed forms and a slow bootstrap; and what is better, worse or the same."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from edgelora.evaluation import bootstrap
from edgelora.evaluation.bootstrap import Difference, Interval, RowSums, interval, pair, resampled
from edgelora.evaluation.comparison import BETTER, MISSING, SAME, WORSE, compare, measure
from edgelora.evaluation.metrics import Metric, judged
from edgelora.evaluation.variants import BARE, Variant, variants_of

ROUGHLY = 0.12
"""Of an interval's width: what 4,000 resamples leave to chance, three standard errors of a 2.5 % quantile."""
SHARE = Metric("share", lambda answer, row: None)
LOSS = Metric("loss", lambda answer, row: None, is_share=False, is_lower_better=True, same=0.01, transform=np.exp)


def intervals(sums: list[RowSums], **how: int) -> list[Interval]:
    return [interval(each, values) for each, values in zip(sums, resampled(sums, **how), strict=True)]


def difference(one: RowSums, other: RowSums) -> Difference:
    both = pair(one, other)
    return bootstrap.difference(*both, *resampled([*both]))


def means(*values: float) -> RowSums:
    return RowSums(np.array(values, float), np.where(np.isnan(values), np.nan, 1.0))


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    (found,) = intervals([RowSums(values, np.ones(400))], resamples=4000)
    error = values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=ROUGHLY * 4 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=ROUGHLY * 4 * error)


def test_a_ratio_of_sums_is_resampled_as_one() -> None:
    """Perplexity: rows have different numbers of tokens, and a row brings its tokens along."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 50, 60).astype(float)
    losses = tokens * rng.uniform(0.5, 2, 60)
    (found,) = intervals([RowSums(losses, tokens, np.exp)], resamples=4000)
    assert found.value == pytest.approx(math.exp(losses.sum() / tokens.sum()))
    slow, rows = [], random.Random(5)
    for _ in range(4000):
        drawn = rows.choices(range(60), k=60)
        slow.append(math.exp(losses[drawn].sum() / tokens[drawn].sum()))
    low, high = np.quantile(slow, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=ROUGHLY * (high - low))
    unweighted = np.quantile(np.exp(rng.choice(losses / tokens, (4000, 60)).mean(1)), [0.025, 0.975])
    assert abs(found.value - math.exp((losses / tokens).mean())) > 0  # the twin: a mean of means is another number
    assert not np.allclose(unweighted, [found.low, found.high], rtol=1e-3)


def test_pairs_see_what_single_intervals_cannot() -> None:
    """Rows are hard or easy for both: each interval is wide, that of the difference is not."""
    hard = np.random.default_rng(6).normal(0, 10, 200)
    one, other = RowSums(hard + 1, np.ones(200)), RowSums(hard, np.ones(200))
    single = intervals([one, other])
    assert single[0].low < single[1].high
    found = difference(one, other)
    assert (found.interval.value, found.interval.low, found.interval.high) == pytest.approx((1, 1, 1))
    assert found.p_more == 1.0
    assert difference(other, one).p_more == 0.0
    assert difference(one, one) == Difference(Interval(0, 0, 0), 0.5, 200)


def test_the_same_seed_draws_the_same_rows_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = [means(*range(50)), means(*reversed(range(50)))]
    whole = intervals(sums, seed=1)
    monkeypatch.setattr(bootstrap, "ENTRIES_AT_ONCE", 50 * 7)
    assert intervals(sums, seed=1) == whole
    assert intervals(sums, seed=2) != whole


def test_rows_without_a_value_are_left_out_of_pairs() -> None:
    one, other = means(1, math.nan, 1, 0), means(0, 0, math.nan, 0)
    found = difference(one, other)
    assert (found.interval.value, found.n_rows) == (0.5, 2)
    assert one.value == pytest.approx(2 / 3)
    assert math.isnan(means(math.nan).value)


def test_better_and_worse_follow_the_metrics_direction() -> None:
    ones, zeros = means(*[1] * 40), means(*[0] * 40)
    assert compare(SHARE, ones, zeros, "base").verdict == BETTER
    assert compare(SHARE, zeros, ones, "base").verdict == WORSE
    assert compare(SHARE, ones, ones, "base").verdict == SAME
    tokens = np.full(40, 10.0)
    likely, unlikely = (RowSums(np.full(40, loss), tokens, np.exp) for loss in (5.0, 20.0))
    found = compare(LOSS, likely, unlikely, "base")
    assert (found.verdict, found.by_row) == (BETTER, (BETTER,) * 40)
    assert found.difference.interval.value == pytest.approx(math.exp(0.5) - math.exp(2))
    assert compare(LOSS, unlikely, likely, "base").verdict == WORSE


def test_one_row_says_nothing_about_others() -> None:
    found = compare(SHARE, means(1, math.nan), means(0, 0), "base")
    assert (found.verdict, found.by_row, found.difference.interval.value) == (SAME, (BETTER, MISSING), 1.0)
    assert math.isnan(found.difference.interval.low)
    assert math.isnan(intervals([means(1)])[0].high)
    assert compare(SHARE, means(1, 1), means(0, 0), "base").verdict == BETTER


def test_a_metric_that_compares_is_compared_with_a_tie(tmp_path: Path) -> None:
    """What "red on q2" wins over "red" says nothing about what "red" wins over the base."""
    variants = variants_of(tmp_path / "model-f16.gguf", ["red"], [tmp_path / "q2.gguf"])
    values = [means(*[points] * 9) for points in (0.5, 1.0, 0.0, 0.5)]
    wins = {variant.name: value for variant, value in zip(variants, values, strict=True)}
    found = measure([judged("judge-wins", tied=0.5)], variants, {"judge-wins": wins})["judge-wins"]
    verdicts = {name: each.comparison.verdict for name, each in found.items() if each.comparison}
    assert verdicts == {"red": BETTER, "base on q2": WORSE, "red on q2": SAME}


def test_rows_are_the_same_within_the_metrics_tolerance() -> None:
    tokens = np.array([10.0, 10.0, 10.0, math.nan])
    own = RowSums(np.array([10.05, 10.2, 9.8, math.nan]), tokens, np.exp)
    base = RowSums(np.array([10.0, 10.0, 10.0, 10.0]), np.full(4, 10.0), np.exp)
    assert compare(LOSS, own, base, "base").by_row == (SAME, WORSE, BETTER, MISSING)


def test_what_may_be_chance_is_the_same() -> None:
    rng = np.random.default_rng(7)
    one, other = (means(*rng.integers(0, 2, 30)) for _ in range(2))
    found = compare(SHARE, one, other, "base")
    assert found.verdict == SAME
    assert found.count(BETTER) > 0 < found.count(WORSE)


def test_each_is_compared_with_its_own_reference(tmp_path: Path) -> None:
    base, small = tmp_path / "model-f16.gguf", tmp_path / "model-q2.gguf"
    variants = variants_of(base, ["red"], [small])
    assert variants == [
        Variant("base", base, BARE),
        Variant("red", base, "red", "base"),
        Variant("base on model-q2", small, BARE, "base", is_requantized=True),
        Variant("red on model-q2", small, "red", "red", is_requantized=True),
    ]
    values = {
        "base": means(0, 0, 0),
        "red": means(1, 1, 1),
        "base on model-q2": means(0, 0, 0),
        "red on model-q2": means(0, 0, 0),
    }
    found = measure([SHARE], variants, {"share": values})["share"]
    verdicts = {name: each.comparison.verdict for name, each in found.items() if each.comparison}
    assert verdicts == {"red": BETTER, "base on model-q2": SAME, "red on model-q2": WORSE}
    assert found["red"].by_row == (1.0, 1.0, 1.0)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = [each.name for each in variants_of(tmp_path / "m.gguf", [], [tmp_path / "a/m.gguf", tmp_path / "b/m.gguf"])]
    assert names == ["base", "base on m (2)", "base on m (3)"]
