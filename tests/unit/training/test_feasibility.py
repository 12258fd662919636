"""What is refused before it costs time, and what emulated links do to a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from elastic_kfac.cli import main
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, apply_overrides, parse_config, write_config
from elastic_kfac.data.shards import make_shards
from elastic_kfac.errors import ConfigError
from elastic_kfac.experiments.emulation import Emulator
from elastic_kfac.experiments.search_space import Links
from elastic_kfac.kfac.shapes import shapes
from elastic_kfac.placement.costs import factor_elements, second_order_elements
from elastic_kfac.placement.devices import DEVICES, NETWORK, stored_calibration
from elastic_kfac.placement.planner import max_second_order_elements
from elastic_kfac.placement.simulator import Line, device_bytes
from elastic_kfac.runs.feasibility import Sized, why_infeasible
from elastic_kfac.runs.prediction import Outlook
from elastic_kfac.runs.profile import estimate, measure
from elastic_kfac.runs.profiled_steps import PeakBytes
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.callbacks import Callback, KeepGoing, Point
from elastic_kfac.training.first_order import make_optimizer
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.preconditioner import make_preconditioner


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
    model = Sized.of(sized)
    plan = model.plan(world_size)
    decompositions = max_second_order_elements(plan, model.layers, precompute=False)
    needed, plan_size = factor_elements(model.layers) + decompositions, plan.world_size
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
    assert "plan.memory_budget_gib=1e-06" in reason


def test_emulated_step_without_kfac_is_one_all_reduce_on_slow_links(base: Config) -> None:
    plain = changed(base, kfac__enabled=False)
    late = Emulator(Links(world_size=8, latency_s=1.0, gbit_per_s=1e9)).step_seconds(plain)
    # Rabenseifner: 2 log2(8) latencies of a second each.
    assert late == pytest.approx(6.0, rel=0.05)
    thin = Emulator(Links(world_size=8, latency_s=1e-9, gbit_per_s=1e-5)).step_seconds(plain)
    parameters = Sized.of(base).parameter_elements
    # 2 (N - 1) / N of the gradient's bits.
    assert thin == pytest.approx(2 * 7 / 8 * parameters * 32 / 1e4, rel=0.05)


def test_emulated_step_with_kfac_pays_for_its_exchanges(base: Config) -> None:
    links = Links(world_size=8, latency_s=1.0, gbit_per_s=1e9)
    seconds = {
        fraction: Emulator(links).step_seconds(
            changed(base, kfac__grad_worker_frac=fraction, kfac__factor_update_steps=1)
        )
        for fraction in (1.0, 1 / 8)
    }
    # Both all-reduce gradients and factors every step; with one gradient worker per layer the
    # preconditioned gradient is broadcast every step, with eight the decomposition every tenth.
    assert seconds[1.0] == pytest.approx(6 + 6 + 3 / 10, rel=0.1)
    assert seconds[1 / 8] == pytest.approx(6 + 6 + 3, rel=0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "sharded_kfac"])
@pytest.mark.parametrize("fraction", [0.5, "auto"])
def test_plan_from_shapes_is_the_plan_of_training(
    base: Config, optimizer: str, fraction: float | str
) -> None:
    config = changed(base, optimizer__name=optimizer, kfac__grad_worker_frac=fraction)
    sized = Sized.of(config)
    first_order = make_optimizer(sized.model, config.optimizer)
    kfac = make_preconditioner(sized.model, first_order, config, Communicator.solo())
    assert kfac is not None
    assert sized.plan(1) == kfac.plan
    assert [x.name for x in sized.plan(4).layers] == [x.name for x in kfac.plan.layers]
    kfac.close()


def _outlook(config: Config, network: Line = NETWORK, **options: float) -> Outlook:
    sized = Sized.of(config)
    links = replace(stored_calibration("eigen"), network=network)
    return Outlook(sized, measure(sized, links), **options)


def test_outlook_predicts_the_plan_and_suggests_one_that_costs_no_more(base: Config) -> None:
    outlook = _outlook(base)
    one, four = outlook.at(1), outlook.at(4)
    for row in (one, four):
        predicted = row["predicted"]
        assert row["suggested"]["step_s"] <= predicted["step_s"]
        assert row["suggested"]["micro_batch_size"] >= 1
        assert predicted["memory_bytes"] > 12 * Sized.of(base).parameter_elements
        assert sum(predicted["phases_s"].values()) == pytest.approx(predicted["step_s"])
        by_purpose = predicted["received_bytes_by_purpose"].values()
        assert sum(by_purpose) == pytest.approx(predicted["received_bytes"])
    assert one["predicted"]["received_bytes"] == 0 < four["predicted"]["received_bytes"]
    assert four["plan"]["world_size"] == 4
    found = outlook.cross_over()
    assert found["flat_from"] is not None and found["flat_from"] >= 1


def test_profile_adds_up_to_the_step_and_its_parts_are_positive(base: Config) -> None:
    profile = measure(Sized.of(base), stored_calibration("eigen"))
    work = profile.workload
    assert len(work.precondition_s) == len(work.layers)
    assert min(work.precondition_s) > 0 < work.bound_s
    assert min(work.factor_update_s, work.packing_s, work.optimizer_s) > 0
    assert work.forward_backward.slope > 0 < max(line.slope for line in work.step_bytes)
    assert profile.residual is not None and profile.residual > 0


def test_samples_of_a_shape_alone_are_numbers_and_of_a_wrong_one_a_line(base: Config) -> None:
    mlp = changed(base, model__name="mlp")
    sized = Sized.of(mlp, (10,), 3)
    assert bool(torch.isfinite(sized.inputs(4).inputs).all())
    assert bool(torch.isfinite(sized.loss(4)))
    with pytest.raises(ConfigError, match=r"fails on random samples: .*; given: model.name=.*3x20"):
        Sized.of(changed(base, model__name="resnet18"), (3, 20), 3).loss(2)
    language = changed(base, model__name="gpt", task__name="causal_lm")
    with pytest.raises(ConfigError, match="causal_lm are sequences; given: 3x8x8"):
        Sized.of(language, (3, 8, 8), 3)


def test_profile_knows_what_spread_statistics_hold_and_cost(base: Config) -> None:
    wide = changed(
        base,
        model__name="mlp",
        model__arguments={"hidden": [256, 256, 256]},
        kfac__factor_update_steps=5,
        kfac__inverse_update_steps=50,
        train__global_batch_size=128,
    )
    profile = measure(Sized.of(wide), stored_calibration("eigen"))
    spread = profile.workload_of(wide)
    together = profile.workload_of(changed(wide, kfac__stagger=False))
    assert (together.statistics_steps, together.decomposition_steps) == (1, 1)
    assert together.statistics_step_s == 0 <= spread.statistics_step_s
    assert spread.decomposition_steps > 1
    # Sums and new decompositions of one layer at a time instead of all.
    plan = Sized.of(wide).plan(1)
    gained = device_bytes(together, plan, 16) - device_bytes(spread, plan, 16)
    most = factor_elements(spread.layers) + second_order_elements(spread.layers)
    assert 0 < gained < 4 * most


@pytest.mark.parametrize("micro_batch_size", [None, 16])
def test_predicted_memory_is_what_a_run_holds_at_most(
    base: Config, tmp_path: Path, micro_batch_size: int | None
) -> None:
    config = changed(
        base,
        model__name="mlp",
        model__arguments={"hidden": [256, 256]},
        kfac__factor_update_steps=2,
        kfac__inverse_update_steps=4,
        kfac__stagger=False,
        train__epochs=1,
        train__global_batch_size=64,
        train__micro_batch_size=micro_batch_size,
        elastic__snapshot_interval_s=1e6,
    )
    sized = Sized.of(config)
    workload = measure(sized, stored_calibration("eigen")).workload_of(config)
    predicted = device_bytes(
        workload, sized.plan(1), micro_batch_size or 64, accumulates=micro_batch_size is not None
    )
    with PeakBytes() as held:
        steps = _PeakOfSteps(held)
        run_rank(
            config,
            Communicator.solo(),
            store=CheckpointStore(tmp_path),
            callback=steps,
            control=KeepGoing(),
        )
    assert steps.peak == pytest.approx(predicted, rel=0.05)


class _PeakOfSteps(Callback):
    """The most that training has held; a snapshot at the end is another copy, in the host's memory."""

    def __init__(self, held: PeakBytes) -> None:
        self._held, self.peak = held, 0

    def on_point(self, point: Point, step: int) -> None:
        if point == "committed":
            self.peak = self._held.peak


def test_estimate_for_a_device_counts_operations(base: Config) -> None:
    sized = Sized.of(base)
    slow = estimate(sized, DEVICES["v100"], NETWORK)
    fast = estimate(sized, DEVICES["h100"], NETWORK)
    rates = DEVICES["h100"].flops_per_s / DEVICES["v100"].flops_per_s
    passes = slow.workload.forward_backward.at(8) / fast.workload.forward_backward.at(8)
    assert passes == pytest.approx(rates)
    # One Linear of w weights takes 2 w operations forward and 4 w backward, less the first layer's
    # gradient by its input.
    linear = replace(sized, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    linear = replace(linear, layers=tuple(shapes(linear.model, base.kfac)))
    counted = estimate(linear, DEVICES["h100"], NETWORK).workload.forward_backward
    assert counted.at(3) * DEVICES["h100"].flops_per_s == pytest.approx(3 * 4 * 640)


def test_peak_bytes_follow_what_is_held() -> None:
    before = torch.ones(500)
    with PeakBytes() as bytes_:
        assert before.sum() == 500  # what is only read is held as well
        del before
        assert bytes_.peak == 2000 + 4 + 1
        bytes_.peak = 0
        first = torch.ones(1000)
        view = first[10:]
        second = first + 1
        del first
        third = second * 2
        del view, second
        assert bytes_.now == 4000
        third = third * 3
    assert bytes_.peak == 12000
    del third
    assert bytes_.now == 0


def test_suggestion_fits_the_memory_budget_or_names_what_is_needed(base: Config) -> None:
    sized = Sized.of(base)
    profile = measure(sized, stored_calibration("eigen"))
    free = Outlook(sized, profile).at(2)["suggested"]["memory_bytes"]
    tight = Outlook(sized, profile, memory_budget_bytes=0.9 * free).at(2)["suggested"]
    assert tight["memory_bytes"] <= 0.9 * free
    with pytest.raises(ConfigError, match="not even one sample at a time"):
        Outlook(sized, profile, memory_budget_bytes=1.0).at(2)


def test_outlook_of_the_sharded_pipeline_names_the_cheapest_v_collective(base: Config) -> None:
    config = changed(base, optimizer__name="sharded_kfac")
    slow = _outlook(config, Line(1.0, 1e-12)).at(4)["suggested"]["sharded.v_method"]
    wide = _outlook(config, Line(1e-12, 1.0)).at(4)["suggested"]["sharded.v_method"]
    assert slow in ("padded", "fused")
    assert wide == "per_owner"


@pytest.mark.filterwarnings("ignore:factors wider than max_factor_dim")
def test_photos_of_mixed_size_are_planned_at_the_configured_size(tmp_path: Path) -> None:
    """`plan` and the checks of `tune` read the shape that training reads."""
    draw = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            pixels = draw.integers(0, 256, (20 + number, 30 - number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{number}.png")
    make_shards(f"imagefolder:{tmp_path / 'set'}", tmp_path / "shards", "train")
    values = {
        "data": {"shards": str(tmp_path / "shards"), "image_size": 32},
        "plan": {"memory_budget_gib": 1.0, "calibrate": True},
        "train": {"global_batch_size": 4},
    }
    config = parse_config(values)
    assert Sized.of(config).input_shape == (3, 32, 32)
    assert why_infeasible(config, 1) is None
    path = tmp_path / "c.yaml"
    write_config(config, path)
    assert main(["plan", str(path), "--world-size", "1,2"]) == 0
