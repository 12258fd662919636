"""Ranks that step apart and merge, by averaging or by DistNewton; and ranks that mix their batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.loop import Outcome
from support.gloo import run_ranks
from support.training_problems import (
    MemoryOrder,
    RecordingCallback,
    in_one_process,
    states_differ_in,
    train_here,
)

APART: dict[str, Any] = {"optimizer.momentum": 0.5, "elastic.merge_every_steps": 3}
NEWTON: dict[str, Any] = {
    **APART,
    "elastic.merge": "distnewton",
    "distnewton.mode": "abs",
    "distnewton.lr": 1.0,
    "distnewton.gradient_lr": 0.05,
}
CASES: dict[str, dict[str, Any]] = {
    "average": APART,
    "newton": NEWTON,
    "newton-own-batches": {**NEWTON, "distnewton.common_batch": False},
    "lamb": {**APART, "optimizer.name": "lamb", "optimizer.lr": 0.01},
    "mixup": {"mixing.mixup": "running", "mixing.erasing": 0.5, "train.label_smoothing": 0.1},
}

Rows = list[dict[str, Any]]


def _train(folder: str, stop_at: int | None) -> dict[str, tuple[Outcome, Rows]]:
    found = {}
    for name, changes in CASES.items():
        recorded = RecordingCallback()
        outcome = train_here(f"{folder}/{name}", changes, Communicator.world(), stop_at, recorded)
        found[name] = (outcome, recorded.metric_rows)
    return found


def _state(folder: Path) -> TrainingState:
    state = CheckpointStore(folder).load_latest()
    assert state is not None
    return state


def test_four_ranks_that_stepped_apart_rejoin_and_go_on_as_three(tmp_path: Path) -> None:
    # The stop comes between two merges: parking merges first, so that the last steps count.
    parked = run_ranks(4, _train, str(tmp_path), 5, timeout_s=300, group_timeout_s=120)
    for name in CASES:
        assert len({rank[name][0].state_sha256 for rank in parked}) == 1, name
        assert {rank[name][0].status for rank in parked} == {"parked"}
    finished = run_ranks(3, _train, str(tmp_path), None, timeout_s=300, group_timeout_s=120)
    losses = {}
    for name in CASES:
        assert len({rank[name][0].state_sha256 for rank in finished}) == 1, name
        state = _state(tmp_path / name)
        assert state.progress.epoch == 3 and state.ledger.world_sizes == (4, 3)
        assert audit_rows(state.ledger.tail, MemoryOrder()).passed
        rows = finished[0][name][1]
        losses[name] = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
        if name.startswith("newton"):
            newest = [row for row in rows if "merge_newton_rank" in row][-1]
            assert newest["merged_workers"] == 3 and 1 <= newest["merge_newton_rank"] <= 2
            assert newest["merge_sigma"] > 0
        if name in ("average", "lamb"):
            assert state.tensors["optimizer/3.weight/" + _FIRST[name]].abs().sum() > 0
    # Curvature of the ranks' own pairs helps where they agree on the samples.
    assert losses["newton"] < losses["average"]


_FIRST = {"average": "momentum_buffer", "lamb": "exp_avg"}


def test_steps_apart_of_one_rank_are_ordinary_steps(tmp_path: Path) -> None:
    plain = in_one_process(tmp_path / "plain", {"optimizer.momentum": 0.5})
    apart = in_one_process(tmp_path / "apart", APART)
    assert states_differ_in(plain, apart) == []


def test_mixed_batches_are_dropped_by_a_restore(tmp_path: Path) -> None:
    # Epochs of one batch: a run that restarts before each epoch never has a partner to mix with.
    whole = {"train.global_batch_size": 50, "mixing.mixup": "batch"}
    never = in_one_process(tmp_path / "never", {"train.global_batch_size": 50})
    mixed = in_one_process(tmp_path / "mixed", whole)
    assert "model/0.weight" in states_differ_in(never, mixed)
    for stop_at in (1, 1, None):
        train_here(tmp_path / "restarted", whole, Communicator.solo(), stop_at)
    restarted = _state(tmp_path / "restarted")
    ours, theirs = never.model_tensors(), restarted.model_tensors()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-10) for name in ours)
