from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.placement.choice import choose_plan, cross_over
from elastic_kfac.placement.costs import COMPUTE, CostModel, LayerShape
from elastic_kfac.placement.planner import make_plan
from elastic_kfac.placement.simulator import (
    Calibration,
    Line,
    Workload,
    device_bytes,
    fit_line,
    predict_step,
)

Layers = tuple[LayerShape, ...]
GPU = Calibration(
    costs=CostModel(c0=2e-3, c1=4e-12, p=3.0),
    seconds_per_flop=1e-13,
    network=Line(2e-5, 1e-10),
)


def _workload(layers: Layers, **changes: object) -> Workload:
    base = Workload(
        layers=layers,
        parameter_elements=sum(layer.weight_elements for layer in layers) + 50,
        forward_backward=Line(0.01, 0.002),
        factor_statistics=Line(0.001, 0.0002),
        step_bytes=(Line(6000.0, 100.0),),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def _random_layers(rng: random.Random, count: int) -> Layers:
    layers = []
    for index in range(count):
        a, g = rng.randint(2, 40), rng.randint(2, 40)
        layers.append(LayerShape(f"x{index}", a, g, a * g))
    return tuple(layers)


def test_fit_line_recovers_and_never_goes_below_zero() -> None:
    assert fit_line([1, 2, 5], [3.0, 5.0, 11.0]).slope == pytest.approx(2)
    assert fit_line([1, 2, 5], [3.0, 5.0, 11.0]).fixed == pytest.approx(1)
    assert fit_line([1, 2], [5.0, 3.0]) == Line(4.0, 0.0)
    steep = fit_line([1, 2], [1.0, 4.0])
    assert steep.fixed == 0 and steep.slope == pytest.approx(9 / 5)
    with pytest.raises(UsageError, match="two different points"):
        fit_line([1, 1], [2.0, 3.0])


def test_predicted_step_on_one_rank_is_compute_only() -> None:
    layers = (LayerShape("x", 10, 5, 50),)
    workload = _workload(layers, inverse_update_steps=4, factor_update_steps=2, packing_s=3.0)
    calibration = Calibration(COMPUTE, 1e-6, Line(1.0, 1.0), seconds_per_copied_byte=1.0)
    step = predict_step(
        workload, calibration, make_plan(layers, 1, 1.0), global_batch_size=10, micro_batch_size=4
    )
    assert step.forward_backward == pytest.approx(3 * (0.01 + 4 * 0.002))
    assert step.factor_statistics == pytest.approx(3 * (0.001 + 4 * 0.0002) / 2)
    assert step.decompositions == pytest.approx((1000 + 125) / 4)
    assert step.precondition == pytest.approx(4 * 50 * 15 * 1e-6)
    communication = (
        step.packing,
        step.gradient_all_reduce,
        step.factor_all_reduce,
        step.second_order_broadcast,
        step.preconditioned_broadcast,
    )
    assert communication == (0, 0, 0, 0, 0)
    assert step.total == pytest.approx(
        step.forward_backward + step.factor_statistics + step.decompositions + step.precondition
    )


def test_predicted_collectives_are_latency_and_bytes() -> None:
    layers = (LayerShape("x", 10, 5, 50), LayerShape("y", 4, 4, 16))
    workload = _workload(layers, inverse_update_steps=5, factor_update_steps=2, packing_s=3.0)
    calibration = Calibration(COMPUTE, 0.0, Line(0.5, 0.001), seconds_per_copied_byte=0.01)
    plan = make_plan(layers, 4, 0.5)
    step = predict_step(workload, calibration, plan, global_batch_size=8, micro_batch_size=2)
    parameters = 4 * (66 + 50)
    assert step.gradient_all_reduce == pytest.approx(4 * 0.5 + 2 * 3 / 4 * parameters * 0.001)
    packed = 4 * (55 + 15 + 10 + 10)
    assert step.factor_all_reduce == pytest.approx((4 * 0.5 + 2 * 3 / 4 * packed * 0.001) / 2)
    e = 4 * (100 + 25 + 50 + 16 + 16 + 16)
    assert step.second_order_broadcast == pytest.approx((0.5 + e / 4 * 0.001) / 5)
    assert step.preconditioned_broadcast == pytest.approx(0.5 + 4 * 66 / 2 * 0.001)
    copied = parameters + e / 4 / 5 + 4 * 66 / 2
    assert step.packing == pytest.approx(3.0 / 2 + 0.01 * copied)


def test_spread_work_costs_further_steps_and_calls() -> None:
    layers = (LayerShape("x", 10, 5, 50), LayerShape("y", 4, 4, 16), LayerShape("z", 4, 4, 16))
    together = _workload(layers, factor_update_steps=4, inverse_update_steps=8)
    spread = replace(together, statistics_steps=3, statistics_step_s=0.5, decomposition_steps=6)
    calibration = Calibration(COMPUTE, 0.0, Line(0.0, 0.0), seconds_per_call=1.0)

    def step(workload: Workload, ranks: int, columns: int) -> tuple[float, float]:
        plan = make_plan(layers, ranks, 1.0 / columns)
        found = predict_step(
            workload, calibration, plan, global_batch_size=ranks, micro_batch_size=1
        )
        return found.factor_statistics, found.packing

    once = step(together, 1, 1)
    assert step(spread, 1, 1) == (pytest.approx(once[0] + 2 * 0.5 / 4), 0.0)
    # Gradients, then counts and sums of statistics, then one bucket of each of two owners.
    assert step(together, 2, 1)[1] == pytest.approx(1 + 2 / 4 + 2 / 8)
    assert step(spread, 2, 1)[1] == pytest.approx(1 + 2 * 3 / 4 + 6 / 8)
    # One worker per layer: no decompositions travel, but results of both columns do.
    assert step(spread, 2, 2)[1] == pytest.approx(1 + 2 * 3 / 4 + 2)


def test_buffers_of_several_ranks_count_where_they_are_more_than_the_passes() -> None:
    layers = (LayerShape("x", 10, 5, 50), LayerShape("y", 4, 4, 16))
    s, e = 4 * (100 + 25 + 32), 4 * (100 + 25 + 50 + 32 + 16)
    workload = _workload(
        layers,
        step_bytes=(Line(0.0, 1.0),),
        exchange_bytes=300.0,
        decomposing_bytes=250.0,
        index_bytes=7.0,
    )

    def needed(ranks: int, columns: int, samples: int, **changes: Any) -> float:
        plan = make_plan(layers, ranks, 1.0 / columns)
        return device_bytes(replace(workload, **changes), plan, samples)

    assert needed(1, 1, 2) == s + e + 2
    # The sum of one pass for the largest factor, with all its blocks, beside that of the passes before.
    alone = make_plan(layers, 1, 1.0)
    assert device_bytes(workload, alone, 2, accumulates=True) == s + e + 402
    blocks = (replace(layers[0], a_blocks=3, copies=2), layers[1])
    blocked = replace(workload, layers=blocks)
    added = device_bytes(blocked, alone, 2, accumulates=True) - device_bytes(blocked, alone, 2)
    assert added == 4 * 2 * 3 * 100
    # Old decompositions, new ones, and the buffers that bring them.
    assert needed(2, 1, 2) == 7 + 250 + s + 3 * e
    # The line of few samples, until that of many is above.
    lines = (Line(0.0, 1.0), Line(2000.0, 0.5))
    assert needed(1, 1, 2, step_bytes=lines) == s + e + 2001
    assert needed(1, 1, 10**6, step_bytes=lines) == s + e + 10**6
    assert needed(2, 1, 10**6) == 7 + s + e + 10**6
    assert needed(2, 1, 2, bucket_bytes=1.0) == 7 + 250 + s + 2 * e
    assert needed(2, 1, 2, decomposition_steps=2) == 7 + 250 + s + e + 2 * 4 * (100 + 25 + 50)
    # With one worker per layer only statistics are in a buffer, as triangles.
    own = s + 4 * (100 + 25 + 50)
    assert needed(2, 2, 2) == 7 + 300 + own + 4 * (55 + 15 + 10 + 10)
    assert needed(2, 2, 2, statistics_steps=2) == 7 + 300 + own + 4 * (55 + 15)
    assert needed(2, 2, 2, symmetric=False) == 7 + 300 + own + s


def test_hierarchical_all_reduce_sends_one_shard_between_nodes() -> None:
    flat = Calibration(COMPUTE, 0.0, Line(0.0, 1.0))
    nodes = replace(flat, inside_node=Line(0.0, 0.01), ranks_per_node=4)
    inside = 2 * 3 / 4 * 800 * 0.01
    assert nodes.all_reduce_seconds(16, 800) == pytest.approx(inside + 2 * 3 / 4 * 200)
    assert nodes.all_reduce_seconds(4, 800) == pytest.approx(inside)
    assert flat.all_reduce_seconds(16, 800) == pytest.approx(2 * 15 / 16 * 800)


def test_choice_equals_brute_force_and_never_exceeds_the_budget() -> None:
    rng = random.Random(5)
    fitted = 0
    for _ in range(60):
        layers = _random_layers(rng, rng.randint(1, 5))
        n, batch = rng.randint(1, 6), rng.randint(1, 40)
        workload = _workload(
            layers,
            inverse_update_steps=rng.choice([1, 5, 50]),
            forward_backward=Line(rng.uniform(0, 0.02), rng.uniform(0, 0.01)),
            step_bytes=(Line(6000.0, 100.0), Line(rng.choice([0.0, 7000.0]), 80.0)),
        )
        calibration = Calibration(
            CostModel(rng.uniform(0, 1e-3), 1e-7, 3.0),
            rng.uniform(0, 1e-9),
            Line(rng.uniform(0, 1e-3), rng.uniform(0, 1e-6)),
        )
        budget = rng.uniform(5e3, 9e4)
        best = math.inf
        for columns in range(1, n + 1):
            plan = make_plan(layers, n, 1 / columns, costs=calibration.costs)
            for micro_batch in range(1, -(-batch // n) + 1):
                more = micro_batch < -(-batch // n)
                if device_bytes(workload, plan, micro_batch, accumulates=more) <= budget:
                    step = predict_step(
                        workload,
                        calibration,
                        plan,
                        global_batch_size=batch,
                        micro_batch_size=micro_batch,
                    )
                    best = min(best, step.total)
        options = {"global_batch_size": batch, "memory_budget_bytes": budget}
        if best == math.inf:
            with pytest.raises(ConfigError, match="not even one sample"):
                choose_plan(workload, calibration, n, **options)  # type: ignore[arg-type]
            continue
        fitted += 1
        choice = choose_plan(workload, calibration, n, **options)  # type: ignore[arg-type]
        assert choice.memory_bytes <= budget
        more = choice.micro_batch_size < -(-batch // n)
        assert choice.memory_bytes == device_bytes(
            workload, choice.plan, choice.micro_batch_size, accumulates=more
        )
        assert choice.step_time.total == pytest.approx(best)
    assert 20 < fitted < 60


def test_ample_memory_and_rare_inverses_choose_comm_opt_tight_memory_mem_opt(
    resnet50: Layers,
) -> None:
    workload = _workload(resnet50, inverse_update_steps=100)
    bandwidth_bound = replace(GPU, seconds_per_flop=0.0, network=Line(0.0, 1e-9))
    ample = choose_plan(workload, bandwidth_bound, 16, global_batch_size=512)
    assert ample.plan.strategy == "COMM-OPT"
    mem_opt = make_plan(resnet50, 16, 1 / 16, costs=GPU.costs)
    tight = choose_plan(
        workload,
        bandwidth_bound,
        16,
        global_batch_size=512,
        memory_budget_bytes=device_bytes(workload, mem_opt, 1, accumulates=True),
    )
    assert tight.plan.strategy == "MEM-OPT"
    frequent = replace(workload, inverse_update_steps=1)
    assert choose_plan(frequent, bandwidth_bound, 16, global_batch_size=512).num_columns > 1


def test_iteration_time_falls_with_the_fraction_when_inverses_are_rare(resnet50: Layers) -> None:
    workload = _workload(resnet50, inverse_update_steps=10)
    bandwidth_bound = replace(GPU, seconds_per_flop=0.0, network=Line(0.0, 1e-9))
    times = [
        predict_step(
            workload,
            bandwidth_bound,
            make_plan(resnet50, 16, f / 16),
            global_batch_size=512,
            micro_batch_size=32,
        ).total
        for f in (1, 2, 4, 8, 16)
    ]
    assert times == sorted(times, reverse=True)


def test_choice_keeps_the_current_plan_unless_the_gain_is_above_the_hysteresis(
    resnet50: Layers,
) -> None:
    workload = _workload(resnet50, inverse_update_steps=100)
    best = choose_plan(workload, GPU, 8, global_batch_size=256)
    other_columns = 2 if best.num_columns != 2 else 4
    current = choose_plan(workload, GPU, 8, global_batch_size=256, num_columns=other_columns)
    gain = 1 - best.step_time.total / current.step_time.total
    assert gain > 0
    kept = choose_plan(
        workload, GPU, 8, global_batch_size=256, current=current, hysteresis=gain * 1.01
    )
    assert kept.num_columns == other_columns
    moved = choose_plan(
        workload, GPU, 8, global_batch_size=256, current=current, hysteresis=gain * 0.99
    )
    assert moved.num_columns == best.num_columns
    needed = device_bytes(workload, current.plan, 1, accumulates=True)
    spread = make_plan(resnet50, 8, 1 / 8, costs=GPU.costs)
    mem_opt = device_bytes(workload, spread, 1, accumulates=True)
    assert mem_opt < needed
    forced = choose_plan(
        workload,
        GPU,
        8,
        global_batch_size=256,
        memory_budget_bytes=(needed + mem_opt) / 2,
        current=current,
        hysteresis=1.0,
    )
    assert forced.num_columns != other_columns


def test_given_fraction_is_honoured(resnet50: Layers) -> None:
    choice = choose_plan(
        _workload(resnet50), GPU, 7, global_batch_size=64, num_columns=3, max_micro_batch_size=4
    )
    assert choice.num_columns == 3
    assert choice.micro_batch_size <= 4


def test_suggested_interval_bounds_the_share_of_decompositions(resnet50: Layers) -> None:
    workload = _workload(resnet50, factor_update_steps=10, inverse_update_steps=10)
    choice = choose_plan(workload, GPU, 8, global_batch_size=256)
    suggested = choice.suggested_inverse_update_steps
    assert suggested % 10 == 0

    def share(steps: int) -> float:
        step = predict_step(
            replace(workload, inverse_update_steps=steps),
            GPU,
            choice.plan,
            global_batch_size=256,
            micro_batch_size=choice.micro_batch_size,
        )
        return (step.decompositions + step.second_order_broadcast) / step.total

    assert share(suggested) <= 0.1 + 1e-9
    assert suggested == 10 or share(suggested - 10) > 0.1


def test_fixed_budget_gives_smaller_batches_to_larger_fractions(resnet50: Layers) -> None:
    workload = _workload(resnet50, step_bytes=(Line(4e8, 80e6),), inverse_update_steps=100)
    sizes = [
        choose_plan(
            workload,
            GPU,
            64,
            global_batch_size=64 * 80,
            num_columns=columns,
            memory_budget_bytes=8e9,
        ).micro_batch_size
        for columns in (64, 2, 1)
    ]
    # 87, 82 and 78 samples would fit: all 80 of a rank at once, or two passes.
    assert sizes == [80, 80, 40]


def test_choice_for_1024_ranks_tries_one_plan_per_column_size(resnet50: Layers) -> None:
    choice = choose_plan(_workload(resnet50), GPU, 1024, global_batch_size=8192)
    assert choice.plan.world_size == 1024


def test_time_falls_with_ranks_up_to_the_layers_and_is_flat_beyond(resnet50: Layers) -> None:
    # Every factor costs nearly the same, as small decompositions on a GPU do.
    latency_bound = replace(
        GPU, costs=CostModel(c0=5e-3, c1=1e-14, p=3.0), network=Line(1e-6, 1e-12)
    )
    workload = _workload(resnet50, inverse_update_steps=1)

    def model_parallel(n: int) -> float:
        plan = make_plan(resnet50, n, 1 / n, costs=latency_bound.costs)
        return predict_step(
            workload, latency_bound, plan, global_batch_size=32 * n, micro_batch_size=32
        ).decompositions

    times = [model_parallel(n) for n in (1, 2, 4, 9, 18, 27, 54, 128, 1024)]
    assert all(later < earlier for earlier, later in pairwise(times[:7]))
    assert times[6] == pytest.approx(times[7]) == pytest.approx(times[8])
    assert cross_over(workload, latency_bound).flat_from == 54


def test_cross_over_of_a_pure_cube_is_flat_from_five(resnet50: Layers) -> None:
    workload = _workload(resnet50)
    fast = replace(GPU, costs=CostModel(0.0, 1.7e-10, 3.0))
    found = cross_over(workload, fast)
    assert found.flat_from == 5
    assert found.divide_from == 2
    slow = replace(fast, network=Line(0.0, 1.0))
    assert cross_over(workload, slow).divide_from is None


def test_cross_over_from_where_exchange_is_cheaper_than_the_work_saved() -> None:
    layers = tuple(LayerShape(f"x{i}", 10, 10, 100) for i in range(8))
    workload = _workload(layers)
    # 16 s of work; divided, each of n ranks does 2 ceil(8 / n) s and waits ceil(log2 n) latencies.
    for latency, divide_from in ((7.9, 2), (8.1, None), (4.0, 2)):
        calibration = Calibration(CostModel(1.0, 0.0, 1.0), 0.0, Line(latency, 0.0))
        assert cross_over(workload, calibration).divide_from == divide_from
    # One layer is three quarters of the work, so two ranks save 4 s and any more save nothing else.
    uneven = (LayerShape("wide", 12, 0, 12), *(LayerShape(f"x{i}", 1, 0, 1) for i in range(4)))
    workload = _workload(uneven, element_bytes=1, precompute=False)
    calibration = Calibration(CostModel(0.0, 1.0, 1.0), 0.0, Line(0.0, 0.0))
    assert cross_over(workload, calibration).flat_from == 2


def test_cross_over_may_need_more_than_two_ranks() -> None:
    layers = tuple(LayerShape(f"x{i}", 10, 10, 100) for i in range(3))
    # 6 s alone; two ranks need 4 + B / 2, three 2 + 2 B / 3, with B = 4.2 s for all bytes.
    calibration = Calibration(CostModel(1.0, 0.0, 1.0), 0.0, Line(0.0, 4.2 / (3 * 300 * 4)))
    found = cross_over(_workload(layers), calibration)
    assert (found.divide_from, found.flat_from) == (3, 3)
