"""What a rank measures about itself, against a run whose course is known."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.observability.telemetry import Values
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.callbacks import Callback, Callbacks, KeepGoing, Point
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.measurement import RankProbe
from support.training_problems import memory_datasets, small_config

STEPS = 12
"""Three epochs of 50 samples in batches of 16."""


class Measured(Callback):
    """A probe that is read after every committed step."""

    def __init__(self) -> None:
        self.probe = RankProbe()
        self.said: list[Values] = []

    def on_point(self, point: Point, step: int) -> None:
        if point == "committed":
            self.said.append(self.probe.run_values())


def trained(folder: Path, **changes: Any) -> Measured:
    recorded = Measured()
    store = CheckpointStore(folder)
    store.after_save = recorded.probe.checkpoint_written
    run_rank(
        small_config({key.replace("__", "."): value for key, value in changes.items()}),
        Communicator.solo(),
        store=store,
        callback=Callbacks(recorded.probe, recorded),
        control=KeepGoing(),
        datasets=memory_datasets(),
    )
    return recorded


def total(recorded: Measured, column: str, *labels: str) -> float:
    return sum(values[column].get(labels, 0.0) for values in recorded.said if column in values)


def test_phases_of_a_run_are_all_seen_and_do_not_overlap(tmp_path: Path) -> None:
    begin = time.perf_counter()
    recorded = trained(tmp_path, kfac__enabled=True, elastic__snapshot_interval_s=1e-9)
    in_steps = (
        "forward_backward",
        "communication",
        "factors",
        "decompositions",
        "preconditioning",
        "optimizer",
    )
    spent = {phase: total(recorded, "phase_time_s", phase) for phase in in_steps}
    assert all(elapsed > 0 for elapsed in spent.values()), spent
    assert total(recorded, "phase_time_s", "evaluation") > 0
    assert total(recorded, "phase_time_s", "snapshot") > 0
    # They never overlap.
    assert sum(spent.values()) <= time.perf_counter() - begin


def test_decompositions_and_factor_updates_are_counted_per_layer(tmp_path: Path) -> None:
    recorded = trained(tmp_path, kfac__enabled=True, kfac__inverse_update_steps=4)
    assert total(recorded, "factor_updates") == STEPS
    assert math.isclose(total(recorded, "inverse_updates"), STEPS / 4)
    assert total(recorded, "skipped_steps") == 0
    conditions = recorded.said[-1]["condition_number"]
    assert set(conditions) == {(f, s) for f in "AG" for s in ("median", "max")}
    assert all(value >= 1 for value in conditions.values())
    assert conditions["A", "max"] >= conditions["A", "median"]


def test_run_without_kfac_has_no_curvature(tmp_path: Path) -> None:
    recorded = trained(tmp_path)
    assert recorded.said[-1]["condition_number"] == {}
    assert "factor_updates" not in recorded.said[-1]
    assert total(recorded, "phase_time_s", "optimizer") > 0
    assert "memory_bytes" not in recorded.probe.rank_values()


def test_rank_tells_cpu_time_memory_and_its_checkpoints(tmp_path: Path) -> None:
    recorded = trained(tmp_path, kfac__enabled=True)
    with recorded.probe.own_cpu():
        sum(range(10_000))
    values = recorded.probe.rank_values()
    assert values["step_cpu_s"][()] > values["telemetry_cpu_s"][()] > 0
    files = (tmp_path / "checkpoints").glob("step-*/state-*")
    newest = recorded.probe.run_values()
    assert newest["checkpoint_bytes"][()] == sum(file.stat().st_size for file in files)
    assert newest["checkpoint_time_s"][()] > 0


def test_rank_tells_its_factor_while_it_is_named_as_slow(tmp_path: Path) -> None:
    recorded = trained(tmp_path)
    assert recorded.probe.rank_values()["slow_rank_factor"] == {(): 0.0}
    assert recorded.probe._trainer is not None and recorded.probe._trainer.slow is not None
    recorded.probe._trainer.slow.factors[0] = 2.0
    assert recorded.probe.rank_values()["slow_rank_factor"] == {(): 2.0}


def test_continued_run_counts_only_its_own_updates(tmp_path: Path) -> None:
    options = {"kfac__enabled": True, "kfac__factor_update_steps": 1}
    trained(tmp_path, **options, train__epochs=2)
    recorded = trained(tmp_path, **options, train__epochs=3)
    assert total(recorded, "factor_updates") == STEPS / 3
