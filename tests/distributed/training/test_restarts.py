"""New processes go on from what killed or parked ones left, and no rank reads a damaged checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError, ElasticKfacError
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.callbacks import Callbacks, Point
from elastic_kfac.training.loop import Outcome
from support.faults import Faults
from support.gloo import run_ranks
from support.training_problems import (
    AwaitCheckpoint,
    MemoryOrder,
    in_one_process,
    states_differ_in,
    train_here,
)


def train(folder: str, stop_at: int | None) -> Outcome:
    return train_here(folder, {}, Communicator.world(), stop_at)


def fail_to_load(folder: str) -> str:
    try:
        train(folder, None)
    except ElasticKfacError as error:
        return error.line()
    return "no error"


def test_damaged_checkpoints_are_the_same_error_on_every_rank(tmp_path: Path) -> None:
    train(str(tmp_path), 2)
    (damaged,) = (tmp_path / "checkpoints/step-000000000002").glob("*.safetensors")
    damaged.write_bytes(b"x")
    lines = run_ranks(2, fail_to_load, str(tmp_path))
    assert lines[0] == lines[1]
    assert "none of 1 checkpoints can be read" in lines[0]


def train_until_killed(folder: str, kill_rank: int, step: int, point: Point) -> str:
    communicator = Communicator.world()
    faults = Faults(communicator.rank).fail_at(kill_rank, step, point)
    callback = Callbacks(faults, AwaitCheckpoint(Path(folder)))
    try:
        train_here(folder, {"elastic.snapshot_interval_s": 1e-9}, communicator, callback=callback)
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
        2, train_until_killed, str(folder), kill_rank, step, point, expect_death=[kill_rank]
    )
    assert "failed on rank" in lines[1 - kill_rank]
    saved = CheckpointStore(folder).load_latest()
    assert saved is not None and 1 <= saved.progress.step <= step
    results = run_ranks(3, train, str(folder), None)
    assert results[0].world_sizes == (2, 3)
    state = CheckpointStore(folder).load_latest()
    assert state is not None and state.progress.epoch == 3
    assert states_differ_in(alone, state) == []
    assert audit_rows(state.ledger.tail, MemoryOrder()).passed
