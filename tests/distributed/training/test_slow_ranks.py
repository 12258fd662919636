"""A throttled rank of three: it is named, its share follows, and the run is that of one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.data.dataset import Datasets
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import KeepGoing
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.sync.exchange import Exchange, Totals
from support import slow_ranks
from support.gloo import run_ranks
from support.training_problems import (
    KFAC,
    Callback,
    MemoryDataset,
    RecordingCallback,
    small_config,
    states_differ_in,
)

SLOW = 1
ONSET, RECOVERY = 20, 56
"""Steps from which rank `SLOW` is throttled, and is not any more."""
COMMON: dict[str, Any] = {
    "model.name": "support.slow_ranks:throttled_cnn",
    "train.epochs": 27,  # 81 steps
    "train.eval_every_epochs": 27,
    "elastic.rebalance": True,
}
CASES: dict[str, dict[str, Any]] = {
    "sgd": COMMON,
    "kfac": {**COMMON, **KFAC, "kfac.grad_worker_frac": 0.5},
    "sharded": {**COMMON, "optimizer.name": "sharded_kfac", "kfac.damping": 0.01},
    "tree": {**COMMON, **KFAC, "elastic.reproducible": True, "elastic.logical_shards": 8},
}


def _train(
    folder: str, changes: Mapping[str, Any], communicator: Communicator, callback: Callback
) -> None:
    run_rank(
        small_config(changes),
        communicator,
        store=CheckpointStore(folder),
        callback=callback,
        control=KeepGoing(),
        datasets=Datasets(MemoryDataset(48), MemoryDataset(20)),
    )


def _throttle(point: str, step: int) -> None:
    if point == "step_begin":
        slow = Communicator.world().rank == SLOW and ONSET <= step < RECOVERY
        slow_ranks.FACTOR = 2.0 if slow else 1.0


def _on_ranks(folder: str) -> dict[str, list[dict[str, Any]]]:
    events = {}
    for name, changes in CASES.items():
        recording = RecordingCallback()
        recording.on_point = _throttle  # type: ignore[method-assign]
        with mock.patch("elastic_kfac.training.step.time", slow_ranks.Clock):
            _train(f"{folder}/{name}", changes, Communicator.world(), recording)
        events[name] = recording.events
    return events


def _state(folder: Path) -> TrainingState:
    state = CheckpointStore(folder).load_latest()
    assert state is not None
    return state


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("slow")
    return {**run_ranks(3, _on_ranks, str(folder))[0], "folder": folder}


@pytest.mark.parametrize("case", CASES)
def test_a_throttled_rank_is_named_and_its_share_follows(case: str, events: Any) -> None:
    rows = [row for row in events[case] if row["kind"] in ("slow_rank", "rank_recovered")]
    assert [row["kind"] for row in rows] == ["slow_rank", "rank_recovered"]
    named, recovered = rows
    assert ONSET < named["step"] <= ONSET + 20
    assert RECOVERY < recovered["step"] <= RECOVERY + 20
    assert {(row["rank"], row["world_size"]) for row in rows} == {(SLOW, 3)}
    assert named["factor"] == pytest.approx(2.0)
    assert named["host"] and named["host"] in named["reason"]
    assert "2.0 times as long" in named["reason"]
    shares = "8, 2, 6" if case == "tree" else "7, 3, 6"
    assert f"shares of 16 samples: {shares}" in named["reason"]
    assert recovered["reason"].endswith(
        "shares of 16 samples: 6, 6, 4" if case == "tree" else "shares of 16 samples: 5, 5, 6"
    )


@pytest.mark.parametrize("case", CASES)
def test_shares_that_follow_give_the_run_of_one_process(
    case: str, events: Any, tmp_path: Path
) -> None:
    alone = {**CASES[case], "elastic.rebalance": False}
    _train(str(tmp_path), alone, Communicator.solo(), RecordingCallback())
    expected, found = _state(tmp_path), _state(events["folder"] / case)
    assert states_differ_in(expected, found) == []
    if case == "tree":
        assert found.sha256() == expected.sha256()


def _asleep(folder: str) -> list[dict[str, Any]]:
    slow_ranks.SLEEP_S = 0.03
    slow_ranks.FACTOR = 2.0 if Communicator.world().rank == SLOW else 1.0
    recording = RecordingCallback()
    changes = {**COMMON, "elastic.rebalance": False, "train.epochs": 7}
    _train(folder, changes, Communicator.world(), recording)
    return [*recording.events, *recording.metric_rows]


def test_a_rank_that_really_takes_twice_as_long_is_named(tmp_path: Path) -> None:
    rows = run_ranks(3, _asleep, str(tmp_path))[0]
    [named] = [row for row in rows if row.get("kind") == "slow_rank"]
    assert named["rank"] == SLOW and named["step"] <= 20
    assert "shares" not in named["reason"]
    assert any(row.get("slowest_rank_factor", 0) > 1.5 for row in rows)


def _summed_times(outputs: int) -> tuple[tuple[float, ...], int, int, list[bool]]:
    world = Communicator.world()
    torch.manual_seed(0)
    model = nn.Linear(2, outputs)
    vector = Exchange(model)
    before = vector.flat.numel()
    vector.time_ranks(world.world_size)
    vector.begin_step()
    vector.begin_pass()
    if world.rank == 2:  # the bias is used there only
        model(torch.ones(1, 2)).sum().backward()
    else:
        (model.weight.sum() * 2).backward()
    vector.end_pass(1)
    own = Totals(count=1, seconds=(0.01 * 3**world.rank,))
    totals = vector.reduce(world, own)
    vector.publish_gradients()
    return totals.seconds, before, vector.flat.numel(), [p.grad is None for p in model.parameters()]


def test_times_arrive_with_the_sum_and_take_room_only_where_flags_are_few() -> None:
    for seconds, before, after, unused in run_ranks(3, _summed_times, 4):
        assert seconds == pytest.approx([0.01, 0.03, 0.09], rel=5e-3)
        assert after == before + 1  # three ranks, two parameters
        assert unused == [False, False]


def _unused_bias() -> list[bool]:
    world = Communicator.world()
    model = nn.Linear(2, 3)
    vector = Exchange(model)
    vector.time_ranks(world.world_size)
    vector.begin_step()
    vector.begin_pass()
    model.weight.sum().backward()
    vector.end_pass(1)
    vector.reduce(world, Totals(count=1, seconds=(0.5,)))
    vector.publish_gradients()
    return [p.grad is None for p in model.parameters()]


def test_a_time_is_no_sign_of_use() -> None:
    assert run_ranks(2, _unused_bias) == [[False, True]] * 2
