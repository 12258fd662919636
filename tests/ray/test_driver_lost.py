"""A run whose driver was lost goes on under its name; one without room says what it waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run import trainer
from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.cluster.run.result import RunResult
from elastic_kfac.cluster.run.states import RunState
from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.state.run_folder import RunFolder

STEPS_PER_EPOCH = 45


@pytest.mark.soak
def test_run_whose_driver_was_killed_continues_under_its_name(
    run: Callable[..., RunResult],
    config: Callable[[int], Config],
    cluster: LocalCluster,
    tmp_path: Path,
) -> None:
    often = [("elastic.checkpoint_interval_s", 0.5)]
    settings = parse_config(apply_overrides(config(5000).model_dump(), often))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "elastic_kfac.cli", "train", str(path), "--name", "run"]
    command += ["--storage", str(tmp_path), "--address", cluster.address]
    variables = {**cluster._variables(), "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "driver.log").open("wb") as log:
        driver = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 240
        while len([*tmp_path.glob("run/checkpoints/*/manifest.json")]) < 2:
            assert driver.poll() is None, (tmp_path / "driver.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "driver.log").read_text()
            time.sleep(0.1)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    folder = RunFolder(tmp_path / "run")
    epochs = int(folder.metrics()[-1]["step"]) // STEPS_PER_EPOCH + 4

    result = run(config(epochs), tmp_path / "run")

    assert result.status == "finished"
    assert "continue" in [row["kind"] for row in folder.events()]
    assert next(row["source"] for row in folder.events() if row["kind"] == "state_found") == "disk"
    steps = [row["step"] for row in folder.metrics() if "loss" in row]
    assert steps == list(range(1, epochs * STEPS_PER_EPOCH + 1))
    assert audit_run(folder).problems == ()


@pytest.mark.parametrize(
    ("room", "line"),
    [
        (1, "Waiting: the cluster has room for 1 worker, the run needs 2."),
        (2, "Waiting: Ray is placing a group (capacity: 2 workers)."),
    ],
)
def test_run_without_a_group_says_what_it_waits_for(
    config: Callable[[int], Config], monkeypatch: pytest.MonkeyPatch, room: int, line: str
) -> None:
    class Shown(Display):
        def say(self, line: str) -> None:
            said.append(line)

    said: list[str] = []
    monkeypatch.setattr(trainer, "room_for_workers", lambda per_worker: room)
    needs_two = apply_overrides(config(1).model_dump(), [("elastic.min_workers", 2)])
    run = SimpleNamespace(
        _config=parse_config(needs_two), _display=Shown(), _waiting_since=time.monotonic()
    )
    look = trainer._Driver._report_missing_capacity
    look(run, WAITING, interval_s=0.0)  # type: ignore[arg-type]
    assert said == [line]
    # Not again before the time is over, and not at all while a group steps.
    look(run, WAITING, interval_s=3600.0)  # type: ignore[arg-type]
    look(run, replace(WAITING, state=RunState.RUNNING, world_size=2), interval_s=0.0)  # type: ignore[arg-type]
    assert said == [line]


WAITING = RunView(
    state=RunState.WAITING,
    reason="1 node lost",
    attempt=1,
    world_size=0,
    pids={},
    progress={},
    evaluation={},
    events=(),
    num_events=0,
    outcome=None,
    error=None,
    world_sizes=(2,),
    worker_seconds=0.0,
    in_state_s=0.0,
)
