"""Refresh intervals of the adaptive rule (Osawa et al. 2020)."""

from __future__ import annotations

import torch

from elastic_kfac.kfac.refresh import RefreshClock, next_interval


def intervals_of(statistics: list[torch.Tensor]) -> list[int]:
    clock, snapshots, result, step = RefreshClock(), [], [], 0
    for value in statistics:
        interval = clock.choose(value, snapshots[-1:-3:-1], 0.1)
        snapshots.append(value)
        clock = clock.advanced(step, interval)
        step = clock.next_step
        result.append(interval)
    return result


def test_constant_statistics_grow_like_fibonacci_numbers() -> None:
    one = torch.ones(3, 3)
    assert intervals_of([one] * 8) == [1, 1, 2, 3, 5, 8, 13, 21]


def test_abrupt_change_halves_the_interval_and_never_below_one() -> None:
    one, other = torch.ones(3, 3), 5 * torch.ones(3, 3)
    assert intervals_of([one] * 6 + [other]) == [1, 1, 2, 3, 5, 8, 4]
    alternating = [one if i % 2 else other for i in range(6)]
    assert intervals_of(alternating) == [1] * 6


def test_slow_drift_similar_to_last_but_not_to_the_one_before_keeps_the_interval() -> None:
    drift = [1.08**i * torch.ones(2, 2) for i in range(8)]
    assert intervals_of(drift) == [1] * 8
    assert next_interval(True, False, 5, 3) == 5


def test_clock_is_due_after_its_interval() -> None:
    clock = RefreshClock().advanced(0, 1).advanced(1, 2)
    assert not clock.due(2) and clock.due(3)
    assert clock.refreshes == 2
