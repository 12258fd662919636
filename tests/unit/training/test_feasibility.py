"""What is refused before it costs time, and what emulated links do to a step."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.data.shards import make_shards
from elastic_kfac.experiments.emulation import Emulator
from elastic_kfac.experiments.search_space import Links
from elastic_kfac.kfac.shapes import layer_shape
from elastic_kfac.placement.costs import factor_elements
from elastic_kfac.placement.planner import max_second_order_elements
from elastic_kfac.runs.feasibility import imagined_paths, why_infeasible


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("data") / "digits"
    make_shards("digits", root)
    return parse_config({"data": {"shards": str(root)}, "elastic": {"max_workers": 4}})


def changed(base: Config, **changes: Any) -> Config:
    paths = [(key.replace("__", "."), value) for key, value in changes.items()]
    return parse_config(apply_overrides(base.model_dump(mode="json"), paths))


def test_run_that_fits_has_nothing_against_it(base: Config) -> None:
    assert why_infeasible(changed(base, plan__memory_budget_gib=1.0), room=4) is None


def test_run_that_needs_more_workers_than_there_is_room_for_is_refused(base: Config) -> None:
    reason = why_infeasible(changed(base, elastic__min_workers=3), room=2)
    assert reason is not None
    assert "elastic.min_workers=3" in reason
    assert "room for 2" in reason


def test_batch_smaller_than_the_world_is_refused(base: Config) -> None:
    reason = why_infeasible(changed(base, train__global_batch_size=2), room=4)
    assert reason is not None
    assert "train.global_batch_size=2" in reason


@pytest.mark.parametrize("world_size", [1, 4])
def test_memory_budget_is_the_one_of_the_plan(base: Config, world_size: int) -> None:
    sized = changed(
        base,
        elastic__min_workers=world_size,
        elastic__max_workers=world_size,
        kfac__grad_worker_frac=1 / world_size,
    )
    [(needed, plan_size)] = [
        (
            factor_elements(shapes := [layer_shape(x) for x in kfac.layers])
            + max_second_order_elements(kfac.plan, shapes, precompute=False),
            kfac.plan.world_size,
        )
        for _, kfac in imagined_paths(sized, [world_size])
        if kfac is not None
    ]
    assert plan_size == world_size
    gib = needed * 4 / 2**30
    assert why_infeasible(changed(sized, plan__memory_budget_gib=gib * 1.001), room=4) is None
    reason = why_infeasible(changed(sized, plan__memory_budget_gib=gib * 0.999), room=4)
    assert reason is not None
    assert f"fullest of {world_size} ranks" in reason


def test_auto_share_that_fits_nowhere_is_refused_with_the_planners_reason(base: Config) -> None:
    tight = changed(base, kfac__grad_worker_frac="auto", plan__memory_budget_gib=1e-6)
    reason = why_infeasible(tight, room=4)
    assert reason is not None
    assert "does not fit plan.memory_budget_gib at any grad_worker_frac" in reason


def test_emulated_step_without_kfac_is_one_all_reduce_on_slow_links(base: Config) -> None:
    plain = changed(base, kfac__enabled=False)
    late = Emulator(Links(world_size=8, latency_s=1.0, gbit_per_s=1e9)).step_seconds(plain)
    # Rabenseifner: 2 log2(8) latencies of a second each.
    assert late == pytest.approx(6.0, rel=0.05)
    thin = Emulator(Links(world_size=8, latency_s=1e-9, gbit_per_s=1e-5)).step_seconds(plain)
    [parameters] = [
        sum(each.numel() for each in model.parameters()) for model, _ in imagined_paths(base, [8])
    ]
    # 2 (N - 1) / N of the gradient's bits.
    assert thin == pytest.approx(2 * 7 / 8 * parameters * 32 / 1e4, rel=0.05)


def test_emulated_step_with_kfac_pays_for_its_exchanges(base: Config) -> None:
    links = Links(world_size=8, latency_s=1.0, gbit_per_s=1e9)
    seconds = {
        fraction: Emulator(links).step_seconds(changed(base, kfac__grad_worker_frac=fraction))
        for fraction in (1.0, 1 / 8)
    }
    # Both all-reduce gradients and factors every step; with one gradient worker per layer the
    # preconditioned gradient is broadcast every step, with eight the decomposition every tenth.
    assert seconds[1.0] == pytest.approx(6 + 6 + 3 / 10, rel=0.1)
    assert seconds[1 / 8] == pytest.approx(6 + 6 + 3, rel=0.1)
