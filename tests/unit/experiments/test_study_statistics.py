"""Intervals against closed forms, printed tables and brute force; verdicts at their borders."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from elastic_kfac.experiments.study_statistics import (
    Bounds,
    Interval,
    Verdict,
    interval_of_mean,
    joint,
    paired_interval,
    summarise,
)


def test_summary_is_mean_and_sample_deviation() -> None:
    found = summarise([1.0, 2.0, 4.0])
    assert found is not None
    assert found.mean == pytest.approx(7 / 3)
    assert found.deviation == pytest.approx(
        math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2)
    )
    assert summarise([]) is None
    one = summarise([3.0])
    assert one is not None
    assert (one.mean, one.deviation, one.count) == (3.0, None, 1)


@pytest.mark.parametrize(
    ("values", "quantile"),
    [
        # Degrees of freedom 1 and 2 have closed forms: tan(π(p − 1/2)) and a root.
        ([0.0, 2.0], math.tan(math.pi * 0.475)),
        ([0.0, 1.0, 5.0], 0.95 * math.sqrt(2 / (1 - 0.95**2))),
        # 4 and 9 are in every printed table of Student's distribution.
        ([0.3, -0.2, 0.9, 1.4, 0.1], 2.776445),
        ([float(k * k % 7) for k in range(10)], 2.262157),
    ],
)
def test_interval_of_a_mean_has_students_quantile(values: list[float], quantile: float) -> None:
    found = interval_of_mean(values)
    assert found is not None and found.low is not None and found.high is not None
    reach = quantile * statistics.stdev(values) / math.sqrt(len(values))
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.low == pytest.approx(found.mean - reach, rel=1e-6)
    assert found.high == pytest.approx(found.mean + reach, rel=1e-6)


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = random.Random(3)
    draws, covered = 4000, 0
    for _ in range(draws):
        found = interval_of_mean([generator.gauss(1.5, 2.0) for _ in range(5)])
        assert found is not None and found.low is not None and found.high is not None
        covered += found.low <= 1.5 <= found.high
    # Four standard deviations of a binomial around 95 %.
    assert covered / draws == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / draws))


def test_pairs_are_formed_by_seed_and_a_common_shift_cancels() -> None:
    left = {0: 10.1, 1: 20.1, 2: 30.15, 9: 5.0}
    right = {2: 30.0, 0: 10.0, 1: 20.0, 7: -4.0}
    found = paired_interval(left, right)
    expected = interval_of_mean([0.1, 0.1, 0.15])
    assert found is not None and expected is not None
    assert found.count == 3
    assert found.low == pytest.approx(expected.low)
    assert found.high == pytest.approx(expected.high)
    # Unpaired, the spread between seeds would hide it.
    assert found.low is not None and found.low > 0


def test_ratio_is_the_geometric_mean_of_quotients() -> None:
    found = paired_interval({0: 2.0, 1: 8.0}, {0: 1.0, 1: 1.0}, ratio=True)
    assert found is not None and found.low is not None and found.high is not None
    assert found.mean == pytest.approx(4.0)
    assert found.low * found.high == pytest.approx(16.0)
    assert paired_interval({0: 0.0, 1: 1.0}, {0: 1.0, 1: 1.0}, ratio=True) is None


def test_nothing_in_common_gives_no_interval_and_one_seed_only_a_mean() -> None:
    assert paired_interval({0: 1.0}, {1: 2.0}) is None
    assert paired_interval({0: 3.0}, {0: 1.0}) == Interval(2.0, None, None, 1)
    assert interval_of_mean([1.0, math.nan]) is None


@pytest.mark.parametrize(
    ("bounds", "low", "high", "verdict"),
    [
        (Bounds(low=0, low_is_inside=False), 0.1, 2.0, "holds"),
        (Bounds(low=0, low_is_inside=False), 0.0, 0.0, "fails"),
        (Bounds(low=0), 0.0, 0.0, "holds"),
        (Bounds(low=0), -1.0, 0.0, "undecided"),
        (Bounds(low=0), -1.0, -0.1, "fails"),
        (Bounds(low=0, low_is_inside=False), -1.0, 1.0, "undecided"),
        (Bounds(high=0, high_is_inside=False), 0.0, 1.0, "fails"),
        (Bounds(high=0), 0.0, 1.0, "undecided"),
        (Bounds(-1, 1), -0.9, 0.9, "holds"),
        (Bounds(-1, 1), 0.5, 1.5, "undecided"),
        (Bounds(-1, 1), 1.1, 1.5, "fails"),
        (Bounds(-1, 1), -3.0, 3.0, "undecided"),
    ],
)
def test_claim_is_judged_by_where_the_whole_interval_lies(
    bounds: Bounds, low: float, high: float, verdict: Verdict
) -> None:
    assert bounds.judge(Interval((low + high) / 2, low, high, 5)) == verdict


def test_claim_without_an_interval_is_undecided() -> None:
    assert Bounds(low=0).judge(None) == "undecided"
    assert Bounds(low=0).judge(Interval(9.0, None, None, 1)) == "undecided"


def test_joint_claim_needs_all_and_is_refuted_by_one() -> None:
    assert joint(["holds", "holds"]) == "holds"
    assert joint(["holds", "undecided"]) == "undecided"
    assert joint(["undecided", "fails", "holds"]) == "fails"
    assert joint([]) == "undecided"
