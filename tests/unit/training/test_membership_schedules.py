"""Random lives of worlds: whoever dies, leaves, joins or is late, the run goes on and nothing is lost."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from support.virtual_world import check, check_some

FIRST_SEED = int(os.environ.get("ELASTIC_KFAC_FIRST_SEED", "0"))


def test_schedules_finish_with_every_step_once() -> None:
    generations = [max(g for g, _, _ in check(FIRST_SEED + seed).commits) for seed in range(60)]
    # They are no quiet runs.
    assert max(generations) >= 4


@pytest.mark.soak
def test_hundred_thousand_schedules_finish_with_every_step_once() -> None:
    portions = [range(first, first + 500) for first in range(FIRST_SEED, FIRST_SEED + 100_000, 500)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        assert sum(pool.map(check_some, portions)) == 100_000
