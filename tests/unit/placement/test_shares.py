"""Shares and plans for ranks of different speeds, against brute force."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest

from elastic_kfac.placement.costs import COMPUTE, CostModel, LayerShape
from elastic_kfac.placement.planner import make_plan, rank_loads
from elastic_kfac.placement.shares import shares, slowness
from elastic_kfac.placement.simulator import Calibration, Line, RankSpeed, Workload, predict_step


def test_shares_cover_the_batch_and_no_other_cut_ends_earlier() -> None:
    rng = random.Random(3)
    for _ in range(150):
        ranks, count = rng.randint(1, 4), rng.randint(0, 14)
        speeds = [rng.choice([1.0, 1.0, 0.5, 0.3, 2.7]) for _ in range(ranks)]
        found = shares(count, speeds)
        assert [i for part in found for i in part] == list(range(count))
        ends = max(len(part) / speed for part, speed in zip(found, speeds, strict=True))
        best = min(
            max(n / speed for n, speed in zip(sizes, speeds, strict=True))
            for sizes in product(range(count + 1), repeat=ranks)
            if sum(sizes) == count
        )
        assert ends == pytest.approx(best)


def test_equally_fast_ranks_are_told_by_ones() -> None:
    assert slowness([0.7, 0.7]) == [1, 1]
    assert slowness([1.0, 0.5, 4.0]) == [256, 512, 64]


def _optimum(layers: list[LayerShape], speeds: list[float], colocate: bool, columns: int) -> float:
    """The least time at which the last rank ends, over all places."""
    ranks = range(len(speeds))
    places = [
        (a, g)
        for a in ranks
        for g in ranks
        if a % columns == g % columns
        and (a == g) == (colocate or len(range(a % columns, len(speeds), columns)) == 1)
    ]
    least = float("inf")
    for choice in product(places, repeat=len(layers)):
        ends = [0.0] * len(speeds)
        for layer, (a, g) in zip(layers, choice, strict=True):
            ends[a] += COMPUTE.a_seconds(layer) / speeds[a]
            ends[g] += COMPUTE.g_seconds(layer) / speeds[g]
        least = min(least, max(ends))
    return least


@pytest.mark.parametrize(("seed", "colocate"), [(1, True), (2, True), (3, False)])
def test_makespan_is_within_four_thirds_of_the_optimum(seed: int, colocate: bool) -> None:
    rng = random.Random(seed)
    ratios = []
    for _ in range(60):
        ranks = rng.randint(2, 3)
        count = rng.randint(1, 7 if colocate else 4)
        columns = rng.randint(1, ranks)
        speeds = [rng.choice([1.0, 0.75, 0.5, 0.25, 2.0]) for _ in range(ranks)]
        layers = []
        for index in range(count):
            a, g = rng.randint(1, 30), rng.randint(1, 30)
            layers.append(LayerShape(f"x{index}", a, g, a * g))
        plan = make_plan(
            layers, ranks, 1 / columns, colocate=colocate, costs=COMPUTE, speeds=speeds
        )
        made = max(rank_loads(plan, layers, COMPUTE, speeds))
        ratios.append(made / _optimum(layers, speeds, colocate, columns))
    assert max(ratios) <= 4 / 3 + 1e-6
    assert min(ratios) >= 1 - 1e-6


def test_equal_speeds_plan_like_none() -> None:
    rng = random.Random(9)
    for _ in range(20):
        layers = [LayerShape(f"x{i}", rng.randint(1, 40), rng.randint(1, 40), 9) for i in range(9)]
        n, colocate = rng.randint(1, 5), rng.random() < 0.5
        plain = make_plan(layers, n, 0.5, colocate=colocate)
        assert make_plan(layers, n, 0.5, colocate=colocate, speeds=[0.4] * n) == plain


def test_least_moved_plan_keeps_the_makespan_of_unequal_ranks() -> None:
    rng = random.Random(11)
    for _ in range(20):
        layers = [LayerShape(f"x{i}", rng.randint(1, 40), rng.randint(1, 40), 9) for i in range(6)]
        speeds = [1.0, 0.5, 0.25, 1.0]
        before = make_plan(layers, 3, 1.0, costs=COMPUTE)
        fresh = make_plan(layers, 4, 1.0, costs=COMPUTE, speeds=speeds)
        settled = make_plan(layers, 4, 1.0, costs=COMPUTE, speeds=speeds, previous=before)
        loads = [max(rank_loads(plan, layers, COMPUTE, speeds)) for plan in (fresh, settled)]
        assert loads[1] <= loads[0] * (1 + 1e-6)


def test_predicted_step_follows_the_shares_and_another_world_counts_as_equal() -> None:
    layers = (LayerShape("x", 10, 5, 50),)
    workload = Workload(layers, 50, Line(0.0, 1.0), Line(0.0, 0.0), (Line(0.0, 1.0),))
    calibration = Calibration(
        CostModel(c0=0.0, c1=1.0), 0.0, Line(0.0, 0.0), speeds=(RankSpeed(), RankSpeed(0.5, 0.25))
    )
    plan = make_plan(layers, 2, 1.0, speeds=calibration.decomposition_speeds(2))
    assert plan.placement("x").a_worker == 0
    step = predict_step(workload, calibration, plan, global_batch_size=9, micro_batch_size=9)
    assert step.forward_backward == pytest.approx(6.0)  # 6 samples at speed 1, 3 at 0.5
    assert step.decompositions == pytest.approx(1125 / 10)
    three = make_plan(layers, 3, 1.0)
    wide = predict_step(workload, calibration, three, global_batch_size=9, micro_batch_size=9)
    plain = predict_step(
        workload, replace(calibration, speeds=()), three, global_batch_size=9, micro_batch_size=9
    )
    assert wide == plain
