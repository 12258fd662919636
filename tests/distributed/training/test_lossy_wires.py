"""Lossy wires: near the exact trajectory, with a residual that a resize keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import ConfigError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from support.gloo import run_ranks
from support.training_problems import in_one_process, small_config, train_here

WIRES: dict[str, dict[str, Any]] = {
    wire: {"communication.wire_format": wire, "communication.topk_ratio": 0.25, "train.epochs": 6}
    for wire in ("bf16", "fp16", "int8", "topk")
}


def train_all(folder: str, stop_at: int | None) -> dict[str, str]:
    """The hash of every wire's state."""
    world = Communicator.world()
    return {
        name: train_here(f"{folder}/{name}", changes, world, stop_at).state_sha256
        for name, changes in WIRES.items()
    }


def _state(folder: Path) -> TrainingState:
    state = CheckpointStore(folder).load_latest()
    assert state is not None
    return state


def test_lossy_wires_stay_near_fp32_and_keep_their_residual_through_a_resize(
    tmp_path: Path,
) -> None:
    exact = _weights_of(in_one_process(tmp_path / "alone", {"train.epochs": 6}))
    run_ranks(3, train_all, str(tmp_path / "ranks"), 6)
    parked = {name: _state(tmp_path / "ranks" / name) for name in WIRES}
    for name, state in parked.items():
        residual = state.part("compression") or {}
        assert bool(residual) == (name in ("int8", "topk"))
        assert all(float(value.abs().sum()) > 0 for value in residual.values())
    results = run_ranks(2, train_all, str(tmp_path / "ranks"), None)
    for name, most in (("bf16", 0.02), ("fp16", 0.01), ("int8", 0.1), ("topk", 0.6)):
        assert len({hashes[name] for hashes in results}) == 1
        weights = _weights_of(_state(tmp_path / "ranks" / name))
        error = float((weights - exact).norm() / exact.norm())
        assert 0 < error < most, (name, error)


def _weights_of(state: TrainingState) -> torch.Tensor:
    parts = [t.reshape(-1) for n, t in sorted(state.tensors.items()) if n.startswith("model/")]
    return torch.cat(parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"communication.algorithm": "ring", "communication.wire_format": "int8"},
        {
            "optimizer.name": "sharded_kfac",
            "kfac.damping": 0.01,
            "kfac.kl_clip": None,
            "kfac.method": "inverse",
            "train.precision": "fp16",
        },
    ],
)
def test_combinations_that_do_not_exist_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        small_config(changes)
