"""Policies, attacks and first-order rules do not know the world size, through resizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import KeepGoing
from elastic_kfac.training.loop import Outcome, run_rank
from support.gloo import run_ranks
from support.training_problems import (
    KFAC,
    MemoryOrder,
    RecordingCallback,
    StopAt,
    in_one_process,
    memory_datasets,
    small_config,
    states_differ_in,
)

STEP: dict[str, Any] = {
    "optimizer.lr_schedule": "step",
    "optimizer.decay_epochs": (1, 2),
    "optimizer.decay_factor": 0.5,
}
ABS: dict[str, Any] = {
    "batch.policy": "abs",
    "batch.max_batch_size": 32,
    "batch.patience_epochs": 1,
    "batch.hessian_samples": 23,
    "optimizer.lr": 0.01,
}
FGSM: dict[str, Any] = {"adversarial.attack": "fgsm", "adversarial.radius": 0.05}
BATCH_NORM: dict[str, Any] = {
    "model.name": "support.training_problems:batch_norm_cnn",
    "train.sync_batch_norm": True,
}
EXACT: dict[str, dict[str, Any]] = {
    "lars": {"optimizer.name": "lars", "optimizer.trust": 0.02},
    "lamb": {"optimizer.name": "lamb", "optimizer.lr": 0.01},
    "velocity": {
        "optimizer.name": "velocity_sgd",
        "optimizer.momentum_rule": "ratio0",
        "optimizer.lr_schedule": "polynomial",
        "optimizer.decay_start_epoch": 0.5,
        "optimizer.decay_end_epoch": 4,
        "optimizer.rescale_weights": "shrink",
    },
    "velocity-previous": {
        "optimizer.name": "velocity_sgd",
        "optimizer.momentum_rule": "ratio_prev",
        **STEP,
    },
    "osawa": {
        "optimizer.name": "sharded_kfac",
        "optimizer.momentum_rule": "ratio0",
        "optimizer.lr_schedule": "polynomial",
        "optimizer.rescale_weights": "shrink",
        "optimizer.weight_decay": 0.0,
        "kfac.damping": 0.01,
        "kfac.kl_clip": None,
        "mixing.erasing": 0.5,
    },
    "fb": {"batch.policy": "fb", "batch.max_batch_size": 32, "batch.warmup_epochs": 2},
    "gg": {"batch.policy": "gg", "batch.max_batch_size": 40, **STEP},
    "warmup": {
        "batch.policy": "warmup",
        "batch.max_batch_size": 32,
        "batch.stages": ((1, 20), (2, 32)),
        "elastic.batch_policy": "abs",
    },
    "abs": {**ABS, "train.micro_batch_size": 5},
    "abs-last-layer": {**ABS, "batch.eigenvalue": "last_layer"},
    "absa": {**ABS, **FGSM, "batch.policy": "absa", "batch.max_batch_size": 64},
    "absa-kfac": {
        **ABS,
        **FGSM,
        **KFAC,
        "batch.policy": "absa",
        "batch.eigenvalue": "kfac",
        "batch.report_both": True,
    },
    "robust": {
        "adversarial.attack": "pgd",
        "adversarial.radius": 0.1,
        "adversarial.steps": 2,
        "adversarial.random_start": True,
        "adversarial.fraction": 1.0,
        "train.micro_batch_size": 3,
    },
    "sync-bn": BATCH_NORM,
    "sync-bn-kfac": {**BATCH_NORM, **KFAC},
}


def _train(folder: str, changes: dict[str, Any], stop_at: int | None) -> Outcome:
    return run_rank(
        small_config(changes),
        Communicator.world(),
        store=CheckpointStore(folder),
        callback=RecordingCallback(),
        control=KeepGoing() if stop_at is None else StopAt(stop_at),
        datasets=memory_datasets(),
    )


def _train_all(folder: str, stop_at: int | None) -> dict[str, Outcome]:
    return {name: _train(f"{folder}/{name}", case, stop_at) for name, case in EXACT.items()}


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, by three ranks, then two, then three again."""
    folder = tmp_path_factory.mktemp("course")
    # An epoch has two steps or four: the first end of one comes in the first or the second world.
    for world_size, stop_at in ((3, 3), (2, 2), (3, None)):
        results = run_ranks(
            world_size, _train_all, str(folder), stop_at, timeout_s=300, group_timeout_s=120
        )
        for name in EXACT:
            assert len({outcomes[name].state_sha256 for outcomes in results}) == 1, name
    return folder


@pytest.mark.parametrize("name", EXACT)
def test_three_two_three_ranks_equal_one_process(name: str, resized: Path, tmp_path: Path) -> None:
    alone = in_one_process(tmp_path, EXACT[name])
    together = _state(resized / name)
    assert states_differ_in(alone, together) == []
    assert together.ledger.world_sizes == (3, 2, 3)
    assert audit_rows(together.ledger.tail, MemoryOrder()).passed
    ours, theirs = alone.part("batch_size"), together.part("batch_size")
    assert _rounded(ours) == _rounded(theirs)
    if name.startswith("abs"):
        assert theirs["state"]["batch_size"] > 16, "the batch never grew: nothing was tested"
        assert theirs["epochs"] == 3


def _rounded(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _rounded(value) for key, value in state.items()}
    return round(state, 10) if isinstance(state, float) else state


def _state(folder: Path) -> TrainingState:
    state = CheckpointStore(folder).load_latest()
    assert state is not None and state.progress.epoch == 3
    return state
