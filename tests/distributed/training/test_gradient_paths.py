"""Every way from gradients to weights in `train`: any world size, through resizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import ConfigError
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import KeepGoing
from elastic_kfac.training.loop import Outcome, run_rank
from support.gloo import run_ranks
from support.training_problems import (
    MemoryOrder,
    RecordingCallback,
    StopAt,
    in_one_process,
    memory_datasets,
    small_config,
    states_differ_in,
)

SHARDED: dict[str, Any] = {
    "optimizer.name": "sharded_kfac",
    "kfac.damping": 0.01,
    "kfac.kl_clip": None,
    "kfac.method": "inverse",
}
EXACT: dict[str, dict[str, Any]] = {
    "sharded": SHARDED,
    "sharded-clipped": {**SHARDED, "kfac.kl_clip": 1e-4, "sharded.v_method": "padded"},
    "sharded-gradients": {**SHARDED, "sharded.gather": "gradients"},
    "sharded-adaptive": {**SHARDED, "kfac.refresh": "adaptive", "sharded.wire": "fp32"},
    "ring": {"communication.algorithm": "ring"},
    "rabenseifner": {"communication.algorithm": "rabenseifner"},
    "hierarchical": {"communication.algorithm": "hierarchical"},
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


def _train_all(
    folder: str, cases: dict[str, dict[str, Any]], stop_at: int | None
) -> dict[str, Outcome]:
    return {name: _train(f"{folder}/{name}", changes, stop_at) for name, changes in cases.items()}


def _state(folder: Path) -> TrainingState:
    state = CheckpointStore(folder).load_latest()
    assert state is not None
    return state


def test_four_three_four_ranks_equal_one_process_on_every_path(tmp_path: Path) -> None:
    for world_size, stop_at in ((4, 4), (3, 4), (4, None)):
        results = run_ranks(world_size, _train_all, str(tmp_path / "ranks"), EXACT, stop_at)
        for name in EXACT:
            assert len({outcomes[name].state_sha256 for outcomes in results}) == 1, name
    for name, changes in EXACT.items():
        alone = in_one_process(tmp_path / "alone" / name, changes)
        together = _state(tmp_path / "ranks" / name)
        assert states_differ_in(alone, together) == [], name
        assert together.ledger.world_sizes == (4, 3, 4), name
        assert audit_rows(together.ledger.tail, MemoryOrder()).passed


WIRES: dict[str, dict[str, Any]] = {
    wire: {"communication.wire_format": wire, "communication.topk_ratio": 0.25, "train.epochs": 6}
    for wire in ("bf16", "fp16", "int8", "topk")
}


def test_lossy_wires_stay_near_fp32_and_keep_their_residual_through_a_resize(
    tmp_path: Path,
) -> None:
    exact = _state_of(in_one_process(tmp_path / "alone", {"train.epochs": 6}))
    run_ranks(3, _train_all, str(tmp_path / "ranks"), WIRES, 6)
    parked = {name: _state(tmp_path / "ranks" / name) for name in WIRES}
    for name, state in parked.items():
        residual = state.part("compression") or {}
        assert bool(residual) == (name in ("int8", "topk"))
        assert all(float(value.abs().sum()) > 0 for value in residual.values())
    results = run_ranks(2, _train_all, str(tmp_path / "ranks"), WIRES, None)
    for name, most in (("bf16", 0.02), ("fp16", 0.01), ("int8", 0.1), ("topk", 0.6)):
        assert len({outcomes[name].state_sha256 for outcomes in results}) == 1
        weights = _state_of(_state(tmp_path / "ranks" / name))
        error = float((weights - exact).norm() / exact.norm())
        assert 0 < error < most, (name, error)


def _state_of(state: TrainingState) -> torch.Tensor:
    parts = [t.reshape(-1) for n, t in sorted(state.tensors.items()) if n.startswith("model/")]
    return torch.cat(parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"communication.algorithm": "ring", "communication.wire_format": "int8"},
        {**SHARDED, "train.precision": "fp16"},
    ],
)
def test_combinations_that_do_not_exist_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        small_config(changes)
