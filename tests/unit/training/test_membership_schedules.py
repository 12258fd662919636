"""Random lives of worlds: whoever dies, leaves, joins or is late, the run goes on and nothing is lost."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from support.virtual_world import Schedule, check, check_some, play

FIRST_SEED = int(os.environ.get("ELASTIC_KFAC_FIRST_SEED", "0"))


def test_schedules_finish_with_every_step_once() -> None:
    seeds = range(FIRST_SEED, FIRST_SEED + 100)
    played = {seed: check(seed) for seed in seeds}
    # They are no quiet runs.
    assert max(g for one in played.values() for g, _, _ in one.commits) >= 4
    # Where deaths are noticed, nobody waits until his patience with the dead has ended.
    supervised = [seed for seed in seeds if Schedule.draw(seed).notices_after_s is not None]
    slow = [seed for seed in supervised if played[seed].longest_gap_s >= 5.0]
    assert len(supervised) > 50 and len(slow) <= 3, slow


def test_newcomer_that_dies_while_it_asks_does_not_keep_others_out() -> None:
    # Between any two of its calls to the store, which take a millisecond each.
    for part in range(24):
        deaths = {2: 0.4 + part * 0.0005}
        schedule = Schedule((0, 1), joins={2: 0.4, 3: 0.8}, deaths=deaths, leaves={}, steps=40)
        played = play(part, schedule)
        everything = tuple(range(1, 41))
        assert played.finished == {0: everything, 1: everything, 3: everything}, part


@pytest.mark.soak
def test_hundred_thousand_schedules_finish_with_every_step_once() -> None:
    portions = [range(first, first + 500) for first in range(FIRST_SEED, FIRST_SEED + 100_000, 500)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        assert sum(pool.map(check_some, portions)) == 100_000
