"""Plans during a run: measured links, plans made anew from measured times, newcomers that agree."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from elastic_kfac import KFAC as Preconditioner
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.kfac.calibration import calibration_from, with_links
from elastic_kfac.placement.costs import CostModel
from elastic_kfac.placement.devices import stored_calibration
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.simulator import Calibration
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.planning import PlanReview
from support.gloo import run_ranks
from support.training_problems import (
    KFAC,
    RecordingCallback,
    in_one_process,
    states_differ_in,
    train_here,
)

EVERY_STEP = {"kfac.factor_update_steps": 1, "kfac.inverse_update_steps": 1}
AUTO = {**KFAC, **EVERY_STEP, "kfac.grad_worker_frac": "auto"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _links() -> Calibration:
    return with_links(stored_calibration("eigen"), Communicator.world())


@pytest.mark.parametrize("ranks", [2, 3])
def test_links_are_measured_and_the_same_on_every_rank(ranks: int) -> None:
    found = run_ranks(ranks, _links)
    assert len(set(found)) == 1
    network = found[0].network
    assert network != stored_calibration("eigen").network
    assert math.isfinite(network.fixed) and network.slope >= 0 <= network.fixed
    assert found[0].all_reduce_seconds(ranks, 1 << 20) > 0 < found[0].seconds_per_call


def _hosts_of(rank: int) -> Calibration:
    with mock.patch("socket.gethostname", return_value=f"node{rank // 2}"):
        return with_links(stored_calibration("eigen"), Communicator.world())


def _two_nodes() -> Calibration:
    return _hosts_of(Communicator.world().rank)


def test_links_inside_a_node_and_between_nodes_are_told_apart() -> None:
    found = run_ranks(3, _two_nodes)  # two ranks on one node, one on another
    assert len(set(found)) == 1
    assert found[0].ranks_per_node == 2
    assert found[0].inside_node is not None
    assert found[0].inside_node != found[0].network


def _train(folder: str, changes: dict[str, Any], factor: float) -> list[dict[str, Any]]:
    def wrong(*arguments: Any) -> Calibration:
        known = stored_calibration(*arguments)
        costs = CostModel(known.costs.c0 * factor, known.costs.c1 * factor, known.costs.p)
        return replace(known, costs=costs)

    recording = RecordingCallback()
    with (
        mock.patch("elastic_kfac.training.planning.stored_calibration", wrong),
        mock.patch("elastic_kfac.kfac.shapes.stored_calibration", wrong),
    ):
        train_here(folder, changes, Communicator.world(), callback=recording)
    return recording.events


def _train_and_watch(
    folder: str, changes: dict[str, Any], factor: float, moves: bool
) -> tuple[list[dict[str, Any]], list[float]]:
    """Events, and what costs were multiplied by when they were corrected; with `moves` the plan changes
    with them."""
    ratios, replan = [], PlanReview.replan

    def watched(self: PlanReview, kfac: Preconditioner, step: int) -> dict[str, Any] | None:
        before = kfac.calibration
        found = replan(self, kfac, step)
        if kfac.calibration is not before and kfac.calibration is not None:
            wrong = factor * stored_calibration("eigen").costs.seconds(64)
            ratios.append(kfac.calibration.costs.seconds(64) / wrong)
        return found

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(PlanReview, "replan", watched))
        if moves:
            moved = mock.patch.object(Plan, "diff", lambda *_: ["x: here -> there"])
            stack.enter_context(moved)
        return _train(folder, changes, factor), ratios


@pytest.mark.parametrize(("factor", "moves"), [(1e6, False), (1e-6, True)])
def test_wrong_costs_are_corrected_once_and_nothing_else_changes(
    tmp_path: Path, factor: float, moves: bool
) -> None:
    changes = {**AUTO, "train.epochs": 9, "plan.margin": 1000.0}
    alone = in_one_process(tmp_path / "alone", changes)
    events, ratios = run_ranks(2, _train_and_watch, str(tmp_path / "pair"), changes, factor, moves)[
        0
    ]
    state = CheckpointStore(tmp_path / "pair").load_latest()
    assert state is not None
    assert states_differ_in(alone, state) == []
    replanned = [row for row in events if row["kind"] == "replanned"]
    [ratio] = ratios
    assert ratio < 1e-3 if factor > 1 else ratio > 1e3
    # The same plan is no event.
    assert len(replanned) == moves
    for row in replanned:
        assert "decompositions took" in row["reason"]
        assert "predicted were" in row["reason"]
        assert row["changes"] == ["x: here -> there"]


def test_costs_within_the_margin_and_fixed_fractions_keep_the_plan(tmp_path: Path) -> None:
    for number, changes in enumerate(
        ({"plan.margin": 1e9}, {"plan.margin": None}, {"kfac.grad_worker_frac": 0.5})
    ):
        changes = {**AUTO, "train.epochs": 6, **changes}
        events = run_ranks(2, _train, str(tmp_path / str(number)), changes, 1.0)[0]
        assert "replanned" not in [row["kind"] for row in events]


def test_a_calibrated_run_reports_what_it_measured(tmp_path: Path) -> None:
    changes = {**AUTO, "plan.calibrate": True, "train.epochs": 1}
    events = run_ranks(2, _train, str(tmp_path / "run"), changes, 1.0)[0]
    [row] = [row for row in events if row["kind"] == "calibrated"]
    assert "Gbit/s" in row["reason"] or "unlimited" in row["reason"]
    found = calibration_from(row["calibration"])
    assert found.costs.seconds(64) > 0 < found.seconds_per_flop


def _newcomer_of_a_retuned_rank() -> tuple[object, ...]:
    world = Communicator.world()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    options: dict[str, Any] = {**EVERY_STEP, "kfac.grad_worker_frac": "auto"}
    options = {key.removeprefix("kfac."): value for key, value in options.items()}
    kfac = Preconditioner(model, lr=0.1, process_group=Communicator.solo(), **options)
    if world.rank == 0:
        model(torch.randn(8, 6)).square().mean().backward()
        kfac.step()
        kfac.retune(inverse_update_steps=1000, damping=0.5)
    kfac.resize(world)
    return kfac.tuned, kfac.damping, kfac.plan.sha256, kfac.steps


def test_a_newcomer_goes_on_with_the_intervals_and_damping_in_use() -> None:
    first, second = run_ranks(2, _newcomer_of_a_retuned_rank)
    assert first == second
    assert first[:2] == ({"inverse_update_steps": 1000, "damping": 0.5}, 0.5)


SPEEDS = (1.0, 0.5, 0.25)
UNEQUAL = {
    **KFAC,
    "kfac.grad_worker_frac": 0.5,
    "plan.calibrate": True,
    "plan.unequal_shares": True,
    "train.epochs": 1.5,
}
TREE = {**UNEQUAL, "elastic.reproducible": True, "elastic.logical_shards": 8}


def _on_unlike_hosts(folder: str) -> list[list[dict[str, Any]]]:
    """Two runs on ranks whose hosts are half as fast each as the one before."""
    world = Communicator.world()
    stored = stored_calibration("eigen")
    speed = SPEEDS[world.rank]
    costs = CostModel(stored.costs.c0 / speed, stored.costs.c1 / speed, stored.costs.p)
    own = replace(stored, costs=costs, seconds_per_flop=stored.seconds_per_flop / speed)
    events = []

    with (
        mock.patch("elastic_kfac.kfac.calibration.host_kind", lambda *_: {"rank": world.rank}),
        mock.patch("elastic_kfac.kfac.calibration.measured", lambda *_, **__: own),
    ):
        for name, changes in (("plain", UNEQUAL), ("tree", TREE)):
            callback = RecordingCallback()
            train_here(f"{folder}/{name}", changes, world, callback=callback)
            events.append([row for row in callback.events if row["kind"] == "calibrated"])
    return events


def test_unlike_hosts_get_unequal_shares_and_the_run_of_one_process(tmp_path: Path) -> None:
    plain, tree = run_ranks(3, _on_unlike_hosts, str(tmp_path))[0]
    assert "shares of 16 samples by speed: 10, 4, 2" in plain[0]["reason"]
    assert "shares of 16 samples by speed: 10, 4, 2" in tree[0]["reason"]  # 5, 2 and 1 shards
    assert [speed[0] for speed in plain[0]["calibration"]["speeds"]] == list(SPEEDS)
    for name, changes in (("plain", UNEQUAL), ("tree", TREE)):
        changes = {**changes, "plan.calibrate": False, "plan.unequal_shares": False}
        alone = in_one_process(tmp_path / "alone" / name, changes)
        state = CheckpointStore(tmp_path / name).load_latest()
        assert state is not None
        assert states_differ_in(alone, state) == []
        if name == "tree":
            assert state.sha256() == alone.sha256()
