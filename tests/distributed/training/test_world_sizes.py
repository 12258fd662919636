"""The trajectory does not know the world size: gloo processes against one process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import KeepGoing, Point
from elastic_kfac.training.loop import Outcome, run_rank
from support.faults import Faults
from support.gloo import run_ranks
from support.training_problems import (
    KFAC,
    MemoryDataset,
    MemoryOrder,
    RecordingCallback,
    StopAt,
    in_one_process,
    memory_datasets,
    small_config,
    states_differ_in,
)


def train(
    folder: str, changes: dict[str, Any], stop_at: int | None, stop_rank: int
) -> tuple[Outcome, RecordingCallback, list[int]]:
    communicator = Communicator.world()
    stops = stop_at is not None and communicator.rank == stop_rank
    recorded, datasets = RecordingCallback(), memory_datasets()
    outcome = run_rank(
        small_config(changes),
        communicator,
        store=CheckpointStore(folder),
        callback=recorded,
        control=StopAt(stop_at or 0) if stops else KeepGoing(),
        datasets=datasets,
    )
    assert isinstance(datasets.train, MemoryDataset)
    return outcome, recorded, datasets.train.read_ids


def final_state(folder: Path) -> TrainingState:
    state = CheckpointStore(folder).load_latest()
    assert state is not None and state.progress.epoch == 3
    return state


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.micro_batch_size": 3},
        {"optimizer.name": "adamw", "optimizer.lr": 0.01},
        {"train.loss": "mse"},
        KFAC,
        {**KFAC, "kfac.grad_worker_frac": 1e-6},
        {**KFAC, "kfac.method": "inverse", "train.micro_batch_size": 3},
        {**KFAC, "kfac.stagger": True, "kfac.grad_worker_frac": 0.5},
    ],
    ids=["sgd", "micro", "adamw", "mse", "kfac", "kfac-memopt", "kfac-inverse", "kfac-stagger"],
)
def test_trajectory_on_several_ranks_equals_one_process(
    tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    # The last batch of an epoch has 2 samples: of three ranks, one has none.
    alone = in_one_process(tmp_path / "alone", changes)
    results = run_ranks(world_size, train, str(tmp_path / "ranks"), changes, None, 0)
    together = final_state(tmp_path / "ranks")
    assert states_differ_in(alone, together) == []
    assert {outcome.state_sha256 for outcome, _, _ in results} == {together.sha256()}
    seen = sorted(itertools.chain.from_iterable(ids for _, _, ids in results))
    assert seen == sorted(3 * list(range(50)))
    assert audit_rows(together.ledger.tail, MemoryOrder()).passed


@pytest.mark.parametrize("changes", [{}, KFAC], ids=["sgd", "kfac"])
def test_parked_at_three_and_resumed_at_two_then_one_equals_one_process(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    alone = in_one_process(tmp_path / "alone", changes)
    folder = tmp_path / "elastic"
    # Rank 2 alone is told to stop; all park at its boundary.
    first = run_ranks(3, train, str(folder), changes, 5, 2)
    assert {(o.status, o.progress.step, o.reasons) for o, _, _ in first} == {
        ("parked", 5, ("test",))
    }
    second = run_ranks(2, train, str(folder), changes, 3, 0)
    assert {(o.status, o.progress.step) for o, _, _ in second} == {("parked", 8)}
    assert second[0][1].rewinds == [(5, 0)]
    outcome, _, _ = train(str(folder), changes, None, 0)
    assert outcome.world_sizes == (3, 2, 1)
    assert states_differ_in(alone, final_state(folder)) == []
    assert audit_rows(final_state(folder).ledger.tail, MemoryOrder()).passed


def test_batch_norm_statistics_are_equal_on_all_ranks_and_weighted_by_samples(
    tmp_path: Path,
) -> None:
    changes = {
        "model.name": "support.training_problems:batch_norm_cnn",
        "train.global_batch_size": 25,
    }
    results = run_ranks(3, train, str(tmp_path), changes, None, 0)
    assert len({outcome.state_sha256 for outcome, _, _ in results}) == 1


def fail_to_load(folder: str) -> str:
    from elastic_kfac.errors import ElasticKfacError

    try:
        train(folder, {}, None, 0)
    except ElasticKfacError as error:
        return error.line()
    return "no error"


def test_damaged_checkpoints_are_the_same_error_on_every_rank(tmp_path: Path) -> None:
    train(str(tmp_path), {}, 2, 0)
    (damaged,) = (tmp_path / "checkpoints/step-000000000002").glob("*.safetensors")
    damaged.write_bytes(b"x")
    lines = run_ranks(2, fail_to_load, str(tmp_path))
    assert lines[0] == lines[1]
    assert "none of 1 checkpoints can be read" in lines[0]


def test_keep_local_shrinks_batch_and_rate_and_ramps_after_a_change(tmp_path: Path) -> None:
    changes = {
        "elastic.batch_policy": "keep_local",
        "elastic.max_workers": 2,
        "train.epochs": 3,
        "optimizer.lr": 0.1,
    }
    first = run_ranks(2, train, str(tmp_path), changes, 4, 0)
    rows = [row for row in first[0][1].metric_rows if "loss" in row]
    assert [row["global_batch_size"] for row in rows] == [16, 16, 16, 2]
    assert {row["lr"] for row in rows} == {0.1}
    _, recorded, _ = train(str(tmp_path), changes, None, 0)
    rows = [row for row in recorded.metric_rows if "loss" in row]
    # Epoch 1 ramps from 0.1 to 0.05: the rate in the middle of each batch of 8.
    assert [row["global_batch_size"] for row in rows[:7]] == [8] * 6 + [2]
    expected = [0.1 - 0.05 * (4 + 8 * step) / 50 for step in range(6)]
    assert [row["lr"] for row in rows[:6]] == pytest.approx(expected)
    assert [row["lr"] for row in rows[7:]] == pytest.approx([0.05] * len(rows[7:]))
    assert audit_rows(final_state(tmp_path).ledger.tail, MemoryOrder()).passed


def train_until_killed(
    folder: str, changes: dict[str, Any], kill_rank: int, step: int, point: Point
) -> str:
    communicator = Communicator.world()
    faults = Faults(communicator.rank).fail_at(kill_rank, step, point)
    try:
        run_rank(
            small_config({**changes, "elastic.snapshot_interval_s": 1e-9}),
            communicator,
            store=CheckpointStore(folder),
            callback=faults,
            control=KeepGoing(),
            datasets=memory_datasets(),
        )
    except CommunicationError as error:
        return error.line()
    return "finished"


@pytest.mark.parametrize(
    ("kill_rank", "step", "point"),
    [
        (0, 6, "gradients_exchanged"),
        (0, 9, "committed"),
        (1, 4, "evaluation"),
        (1, 7, "capture"),
        (0, 12, "step_begin"),
    ],
)
def test_kill_then_restart_with_another_world_size_equals_one_process(
    tmp_path: Path, kill_rank: int, step: int, point: Point
) -> None:
    alone = in_one_process(tmp_path / "alone", {})
    folder = tmp_path / "run"
    lines = run_ranks(
        2, train_until_killed, str(folder), {}, kill_rank, step, point, expect_death=[kill_rank]
    )
    assert "failed on rank" in lines[1 - kill_rank]
    saved = CheckpointStore(folder).load_latest()
    assert saved is not None and 1 <= saved.progress.step <= step
    results = run_ranks(3, train, str(folder), {}, None, 0)
    assert results[0][0].world_sizes == (2, 3)
    assert states_differ_in(alone, final_state(folder)) == []
    assert audit_rows(final_state(folder).ledger.tail, MemoryOrder()).passed
