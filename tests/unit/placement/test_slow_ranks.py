"""The detector of slow ranks against closed forms: who is named, when, by which factor, who is not."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

import pytest

from elastic_kfac.placement.shares import shares
from elastic_kfac.placement.slow_ranks import (
    AGREE,
    WARM_UP,
    WINDOW,
    Seen,
    SlowRanks,
    Verdict,
    slowness_of,
)

Slowness = Callable[[int], Sequence[float]]


class World:
    """Ranks whose passes take `slowness · (fixed + samples)`, and whose shares may follow."""

    def __init__(self, slowness: Slowness, *, fixed: float = 0.0, follows: bool = False) -> None:
        self.slowness, self.fixed, self.follows = slowness, fixed, follows
        self.watch = SlowRanks(1.5)
        self.ranks = len(slowness(0))
        self.watch.enter([1.0] * self.ranks)
        self.speeds = [1.0] * self.ranks
        self.verdicts: list[tuple[int, Verdict]] = []
        self.seconds: list[float] = []

    def run(self, steps: range, batch: int = 60, noise: float = 0.0) -> World:
        generator = random.Random(0)
        for step in steps:
            sizes = [len(part) for part in shares(batch, self.speeds)]
            self.seconds = [
                factor * (self.fixed + n) * (1 + noise * generator.uniform(-1, 1)) * 1e-3
                for factor, n in zip(self.slowness(step), sizes, strict=True)
            ]
            found = self.watch.saw(self.seconds, sizes)
            self.verdicts += [(step, verdict) for verdict in found]
            if found and self.follows:
                factors = self.watch.factors
                self.speeds = [1 / factors.get(rank, 1.0) for rank in range(self.ranks)]
        return self


@pytest.mark.parametrize("ranks", [2, 3, 5, 64])
def test_half_speed_is_named_within_twenty_steps(ranks: int) -> None:
    slow = ranks // 2
    world = World(lambda step: [2.0 if r == slow and step >= 30 else 1.0 for r in range(ranks)])
    world.run(range(30), batch=60 * ranks)
    assert world.verdicts == []
    world.run(range(30, 80), batch=60 * ranks)
    [(step, verdict)] = world.verdicts
    assert (verdict.rank, verdict.is_slow) == (slow, True)
    assert verdict.factor == pytest.approx(2.0)
    assert step == 30 + AGREE - 1 < 50


def test_a_rank_that_is_slow_from_the_start_is_named_when_the_window_is_full() -> None:
    world = World(lambda step: [1.0, 1.0, 2.0]).run(range(40))
    [(step, verdict)] = world.verdicts
    assert verdict.rank == 2
    assert step == WARM_UP + WINDOW - 1 < 20


def test_a_recovered_rank_is_cleared() -> None:
    world = World(lambda step: [1.0, 2.0 if step < 40 else 1.0, 1.0]).run(range(80))
    assert [(v.rank, v.is_slow) for _, v in world.verdicts] == [(1, True), (1, False)]
    assert world.verdicts[1][0] == 40 + AGREE - 1
    assert world.watch.factors == {}


def test_a_recovered_rank_whose_times_are_noisy_is_cleared_and_not_named_again() -> None:
    def slowness(step: int) -> Sequence[float]:
        return [2.5 if step < 30 else (0.95, 1.05, 1.4)[step % 3], 1.0]

    verdicts = [verdict for _, verdict in World(slowness).run(range(120)).verdicts]
    assert [verdict.is_slow for verdict in verdicts] == [True, False]


def test_two_slow_ranks_of_five_are_both_named() -> None:
    world = World(lambda step: [1.0, 2.0, 1.0, 3.0, 1.0]).run(range(40))
    assert world.watch.factors == pytest.approx({1: 2.0, 3: 3.0})


@pytest.mark.parametrize(
    "slowness",
    [
        lambda step: [1.4, 1.0, 1.0],  # below the threshold
        lambda step: [3.0 if step % 4 == 0 else 1.0, 1.0, 1.0],  # pauses, not a slow rank
        lambda step: [2.0 if r == step % 3 else 1.0 for r in range(3)],  # another rank every step
        lambda step: [2.0, 2.0, 2.0] if step > 20 else [1.0, 1.0, 1.0],  # all of them
    ],
)
def test_nobody_is_named_for_noise(slowness: Slowness) -> None:
    assert World(slowness).run(range(200), noise=0.05).verdicts == []


def test_values_about_the_threshold_do_not_flicker() -> None:
    world = World(lambda step: [1.5, 1.0, 1.0]).run(range(2000), noise=0.15)
    assert len(world.verdicts) <= 1


def test_expected_speeds_are_no_slowness() -> None:
    watch = SlowRanks(1.5)
    watch.enter([1.0, 0.5])
    for _ in range(40):
        # Shares by speed take equal times, equal shares would take twice as long on the second rank.
        assert watch.saw([0.04, 0.04], [40, 20]) == []
        assert watch.slowness in ([], [1.0, 1.0])


def test_steps_with_ranks_without_samples_are_left_out() -> None:
    watch = SlowRanks(1.5)
    watch.enter([1.0] * 3)
    for _ in range(40):
        assert watch.saw([0.01, 0.05, 0.0], [1, 1, 0]) == []
    assert watch.slowness == []


@pytest.mark.parametrize("fixed", [0.0, 5.0, 20.0, 200.0])
def test_shares_that_follow_settle_and_return(fixed: float) -> None:
    """Whatever a pass costs beside its samples: one change of shares, the same factor, one way back."""
    world = World(
        lambda step: [1.0, 2.0 if step < 100 else 1.0, 1.0], fixed=fixed, follows=True
    ).run(range(100))
    [(_, verdict)] = world.verdicts
    assert verdict.is_slow and verdict.factor == pytest.approx(2.0)
    assert [len(part) for part in shares(60, world.speeds)] == [24, 12, 24]
    assert world.watch.slowness == pytest.approx([2 / 3, 2.0, 2 / 3], rel=0.06)
    if not fixed:
        assert world.seconds == pytest.approx([0.024] * 3)
    world.run(range(100, 160))
    assert [(v.rank, v.is_slow) for _, v in world.verdicts] == [(1, True), (1, False)]
    assert world.speeds == [1.0] * 3


def test_shares_follow_a_rank_that_becomes_still_slower() -> None:
    world = World(
        lambda step: [1.0, 2.0 if step < 60 else 4.0, 1.0, 1.0], fixed=3.0, follows=True
    ).run(range(140))
    assert [v.factor for _, v in world.verdicts] == pytest.approx([2.0, 4.0], rel=0.05)


@pytest.mark.parametrize("ranks", range(2, 8))
def test_slowness_is_the_ratio_to_the_median_of_the_others(ranks: int) -> None:
    seconds = [random.Random(rank).uniform(1, 5) for rank in range(ranks)]
    found = slowness_of(Seen(seconds, [4.0] * ranks), 0.0)
    for rank, own in enumerate(seconds):
        others = seconds[:rank] + seconds[rank + 1 :]
        assert found[rank] == pytest.approx(own / statistics.median(others))


def test_a_new_world_begins_afresh() -> None:
    world = World(lambda step: [1.0, 2.0, 1.0]).run(range(30))
    assert world.watch.factors
    world.watch.enter([1.0, 1.0])
    assert world.watch.factors == {}
    assert world.watch.saw([0.1, 0.5], [8, 8]) == []
