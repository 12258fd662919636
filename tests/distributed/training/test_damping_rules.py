"""Damping that changes during a run, from YAML: the same for every world size, and through a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.callbacks import KeepGoing
from elastic_kfac.training.loop import run_rank
from support.gloo import run_ranks
from support.training_problems import KFAC, RecordingCallback, StopAt, memory_datasets, small_config

RULES: dict[str, Any] = {
    "warmup": {"schedule": "warmup", "start": 1.0, "target": 0.01, "steps": 8},
    "milestones": {"schedule": "milestones", "start": 0.1, "factor": 0.5, "milestones": [3, 6]},
    "levenberg_marquardt": {"rule": "levenberg_marquardt", "initial": 0.1, "interval": 2},
}


def _damping(folder: str, rule: str, changes: dict[str, Any], stop_at: int | None) -> list[float]:
    recording = RecordingCallback()
    run_rank(
        small_config({**KFAC, "kfac.damping": RULES[rule], **changes}),
        Communicator.world(),
        store=CheckpointStore(folder),
        callback=recording,
        control=KeepGoing() if stop_at is None else StopAt(stop_at),
        datasets=memory_datasets(),
    )
    return [float(row["damping"]) for row in recording.metric_rows if "damping" in row]


def _all(
    folder: str, changes: dict[str, Any], stop_at: int | None = None
) -> dict[str, list[float]]:
    return {rule: _damping(f"{folder}/{rule}", rule, changes, stop_at) for rule in RULES}


def test_damping_follows_its_rule_in_every_world_and_through_a_resume(tmp_path: Path) -> None:
    alone = run_ranks(1, _all, str(tmp_path / "alone"), {})[0]
    steps = len(alone["warmup"])
    assert alone["milestones"] == [0.1] * 3 + [0.05] * 3 + [0.025] * (steps - 6)
    assert alone["warmup"][0] == 1.0 and alone["warmup"][-1] < 0.1
    followed = alone["levenberg_marquardt"]
    assert len(set(followed)) > 2  # the loss was measured, and γ moved
    pair = run_ranks(2, _all, str(tmp_path / "pair"), {})[0]
    # Stopped on three ranks after an odd number of steps, resumed on two.
    first = run_ranks(3, _all, str(tmp_path / "elastic"), {}, 5)[0]
    rest = run_ranks(2, _all, str(tmp_path / "elastic"), {})[0]
    for rule, expected in alone.items():
        assert pair[rule] == pytest.approx(expected, rel=1e-9), rule
        assert 0 < len(first[rule]) < steps
        assert first[rule] + rest[rule] == pytest.approx(expected, rel=1e-9), rule


def test_adaptive_damping_of_a_reproducible_run_has_the_same_bits_on_one_and_two_ranks(
    tmp_path: Path,
) -> None:
    changes = {"elastic.reproducible": True}
    one, two = (run_ranks(ranks, _all, str(tmp_path / str(ranks)), changes)[0] for ranks in (1, 2))
    assert one == two and len(set(one["levenberg_marquardt"])) > 2
