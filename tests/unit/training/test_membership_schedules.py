"""Random lives of worlds: whoever dies, leaves, joins or is late, the run goes on and nothing is lost."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from support.virtual_world import Played, Schedule, play

FIRST_SEED = int(os.environ.get("ELASTIC_KFAC_FIRST_SEED", "0"))
PORTION = 500
"""Schedules that a process plays at a time."""


def check(seed: int) -> Played:
    """Plays one schedule and checks it; a failure names the seed."""
    schedule = Schedule.draw(seed)
    hint = f"seed {seed}: {schedule}"
    try:
        played = play(seed, schedule)
    except AssertionError as error:
        raise AssertionError(f"{hint}: {error}") from error
    everything = tuple(range(1, schedule.steps + 1))
    assert played.finished, hint
    # Whoever finished has every step exactly once, in order.
    assert set(played.finished.values()) == {everything}, hint
    # One world at a time commits: a step is only ever committed again in a later generation.
    generations: dict[int, int] = {}
    for generation, step, _ in played.commits:
        assert all(generations.get(later, -1) <= generation for later in (step, step + 1)), hint
        generations[step] = generation
    # Every member of a world begins where the others begin.
    begins: dict[int, set[int]] = {}
    for generation, step in played.restored:
        begins.setdefault(generation, set()).add(step)
    assert all(len(steps) == 1 for steps in begins.values()), hint
    return played


def test_schedules_finish_with_every_step_once() -> None:
    generations = [max(g for g, _, _ in check(FIRST_SEED + seed).commits) for seed in range(60)]
    # They are no quiet runs.
    assert max(generations) >= 4


def check_some(first_seed: int) -> int:
    for seed in range(first_seed, first_seed + PORTION):
        check(seed)
    return PORTION


@pytest.mark.soak
def test_hundred_thousand_schedules_finish_with_every_step_once() -> None:
    first_seeds = range(FIRST_SEED, FIRST_SEED + 100_000, PORTION)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        assert sum(pool.map(check_some, first_seeds)) == 100_000
