"""Settings that change during a run, from YAML: the same for every world size, and through a resume."""

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

FOLLOWS = {"rule": "levenberg_marquardt", "initial": 0.1, "interval": 2}
RULES: dict[str, dict[str, Any]] = {
    "warmup": {"kfac.damping": {"schedule": "warmup", "start": 1.0, "target": 0.01, "steps": 8}},
    "milestones": {
        "kfac.damping": {
            "schedule": "milestones",
            "start": 0.1,
            "factor": 0.5,
            "milestones": [3, 6],
        }
    },
    "levenberg_marquardt": {"kfac.damping": FOLLOWS},
    "levenberg_marquardt, adaptive": {"kfac.damping": FOLLOWS, "kfac.trust_region": "adaptive"},
    "kl_clip": {
        "kfac.kl_clip": {
            "schedule": "milestones",
            "start": 1e-3,
            "factor": 0.1,
            "milestones": [3, 6],
        }
    },
    "factor_decay": {
        "kfac.factor_decay": {"schedule": "warmup", "start": 0.5, "target": 0.95, "steps": 8}
    },
    "intervals": {
        "kfac.factor_update_steps": {
            "schedule": "milestones",
            "start": 1,
            "factor": 2,
            "milestones": [4],
        },
        "kfac.inverse_update_steps": {
            "schedule": "milestones",
            "start": 2,
            "factor": 2,
            "milestones": [4],
        },
    },
}
Row = tuple[float, float]
"""Damping and loss of a step."""


def _rows(folder: str, changes: dict[str, Any], stop_at: int | None) -> list[Row]:
    recording = RecordingCallback()
    run_rank(
        small_config({**KFAC, **changes}),
        Communicator.world(),
        store=CheckpointStore(folder),
        callback=recording,
        control=KeepGoing() if stop_at is None else StopAt(stop_at),
        datasets=memory_datasets(),
    )
    rows = [row for row in recording.metric_rows if "damping" in row]
    return [(float(row["damping"]), float(row["loss"])) for row in rows]


def _all(folder: str, changes: dict[str, Any], stop_at: int | None = None) -> dict[str, list[Row]]:
    cases = {"constant": {}, **RULES}
    return {
        name: _rows(f"{folder}/{name}", {**rule, **changes}, stop_at)
        for name, rule in cases.items()
    }


def test_settings_follow_their_rules_in_every_world_and_through_a_resume(tmp_path: Path) -> None:
    alone = run_ranks(1, _all, str(tmp_path / "alone"), {})[0]
    damping = {name: [row[0] for row in rows] for name, rows in alone.items()}
    steps = len(damping["warmup"])
    assert damping["milestones"] == [0.1] * 3 + [0.05] * 3 + [0.025] * (steps - 6)
    assert damping["warmup"][0] == 1.0 and damping["warmup"][-1] < 0.1
    for name in ("levenberg_marquardt", "levenberg_marquardt, adaptive"):
        assert len(set(damping[name])) > 2  # the loss was measured, and γ moved
    losses = {name: [row[1] for row in rows] for name, rows in alone.items()}
    for name in RULES:
        assert losses[name] != losses["constant"], name
    pair = run_ranks(2, _all, str(tmp_path / "pair"), {})[0]
    # Stopped on three ranks after an odd number of steps, resumed on two.
    first = run_ranks(3, _all, str(tmp_path / "elastic"), {}, 5)[0]
    rest = run_ranks(2, _all, str(tmp_path / "elastic"), {})[0]
    for rule, expected in alone.items():
        assert 0 < len(first[rule]) < steps
        for found in (pair[rule], first[rule] + rest[rule]):
            assert len(found) == len(expected)
            for row, wanted in zip(found, expected, strict=True):
                assert row == pytest.approx(wanted, rel=1e-9), rule


def test_settings_of_a_reproducible_run_have_the_same_bits_on_one_and_two_ranks(
    tmp_path: Path,
) -> None:
    changes = {"elastic.reproducible": True}
    one, two = (run_ranks(ranks, _all, str(tmp_path / str(ranks)), changes)[0] for ranks in (1, 2))
    assert one == two and len({row[0] for row in one["levenberg_marquardt"]}) > 2
