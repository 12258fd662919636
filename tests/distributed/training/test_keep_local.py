"""A batch that follows the world size shrinks with it, and so does the learning rate, on a ramp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from support.gloo import run_ranks
from support.training_problems import MemoryOrder, RecordingCallback, train_here


def rows_of_steps(
    folder: str, changes: dict[str, Any], stop_at: int | None
) -> list[dict[str, Any]]:
    recorded = RecordingCallback()
    train_here(folder, changes, Communicator.world(), stop_at, recorded)
    return [row for row in recorded.metric_rows if "loss" in row]


def test_keep_local_shrinks_batch_and_rate_and_ramps_after_a_change(tmp_path: Path) -> None:
    changes = {
        "elastic.batch_policy": "keep_local",
        "elastic.max_workers": 2,
        "train.epochs": 3,
        "optimizer.lr": 0.1,
    }
    rows = run_ranks(2, rows_of_steps, str(tmp_path), changes, 4)[0]
    assert [row["global_batch_size"] for row in rows] == [16, 16, 16, 2]
    assert {row["lr"] for row in rows} == {0.1}
    rows = rows_of_steps(str(tmp_path), changes, None)
    # Epoch 1 ramps from 0.1 to 0.05: the rate in the middle of each batch of 8.
    assert [row["global_batch_size"] for row in rows[:7]] == [8] * 6 + [2]
    expected = [0.1 - 0.05 * (4 + 8 * step) / 50 for step in range(6)]
    assert [row["lr"] for row in rows[:6]] == pytest.approx(expected)
    assert [row["lr"] for row in rows[7:]] == pytest.approx([0.05] * len(rows[7:]))
    state = CheckpointStore(tmp_path).load_latest()
    assert state is not None and state.progress.epoch == 3
    assert audit_rows(state.ledger.tail, MemoryOrder()).passed
