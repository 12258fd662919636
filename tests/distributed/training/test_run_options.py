"""Clipping, averaged weights, early stopping and hooks: any number of ranks equals one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.loop import Outcome
from support.gloo import run_ranks
from support.training_problems import KFAC, in_one_process, states_differ_in, train_here

ALL: dict[str, Any] = {
    **KFAC,
    "optimizer.clip_grad_norm": 0.3,
    "optimizer.average_decay": 0.5,
    "train.hooks": ["support.training_hooks:Noise"],
    "train.early_stop": {"metric": "loss", "patience": 1, "min_delta": 1e3},
    "train.epochs": 6,
}


def train(folder: str, stop_at: int | None) -> Outcome:
    return train_here(folder, ALL, Communicator.world(), stop_at)


def test_three_ranks_then_two_equal_one_process(tmp_path: Path) -> None:
    alone = in_one_process(tmp_path / "alone", ALL)
    assert alone.progress.step == 8  # Stopped at the second evaluation.
    run_ranks(3, train, str(tmp_path / "run"), 3)
    results = run_ranks(2, train, str(tmp_path / "run"), None)
    assert results[0].world_sizes == (3, 2)
    state = CheckpointStore(tmp_path / "run").load_latest()
    assert state is not None
    assert states_differ_in(alone, state) == []
    assert state.part("early_stopping")["stale"] == 1
