"""Trackers get every row once, and none of them can stop a run."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.cli import main
from elastic_kfac.config import parse_config
from elastic_kfac.errors import ConfigError
from elastic_kfac.observability import trackers
from elastic_kfac.runs import tracking
from elastic_kfac.state.run_folder import RunFolder

ROWS = [
    {"step": 1, "loss": 2.5, "world_size": 2, "metric": "accuracy"},
    {"step": 2, "loss": 2.0, "lr": 0.1, "eval_accuracy": 0.5},
]
LOSSES = [(1, 2.5), (2, 2.0)]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "runs" / "first"))
    folder.write_config(parse_config({}))
    folder.append("metrics.jsonl", ROWS)
    folder.append_events([{"time": 0.0, "kind": "resized", "step": 2, "reason": "a node left"}])
    folder.write_result({"status": "finished"})
    return folder


def send(run: RunFolder, name: str, *, project: str = "elastic-kfac") -> Path:
    config = parse_config({"tracking": {"to": [name], "project": project}})
    tracking.track(run, "first", config)
    return Path(run.uri) / "tracking"


class Broken:
    """A tracker that fails at its second row."""

    def __init__(self, *arguments: object) -> None:
        self.rows = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows += 1
        if self.rows > 1:
            raise OSError("no route to host")

    def event(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        raise AssertionError("called after a failure")

    def close(self, status: str) -> None:
        raise AssertionError("called after a failure")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_values_are_named_by_the_table() -> None:
    row = {"step": 3, "loss": 1.0, "damping": 0.1, "own": 2, "metric": "f1", "flag": True}
    assert trackers.values_of(row) == {
        "train/loss": 1.0,
        "curvature/damping": 0.1,
        "train/own": 2.0,
    }


def test_json_lines(run: RunFolder) -> None:
    found = lines_of(send(run, "jsonl") / "values.jsonl")
    assert [(r["step"], r["value"]) for r in found if r.get("name") == "train/loss"] == LOSSES
    sizes = [r for r in found if r.get("name") == "elastic/world_size"]
    assert [(r["run"], r["unit"]) for r in sizes] == [("first", "workers")]
    assert [r["event"] for r in found if "event" in r] == ["resized", "finished"]


def test_tensorboard(run: RunFolder) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (send(run, "tensorboard") / "tensorboard").glob("events.*")
    content, scalars = file.read_bytes(), []
    while content:  # A record: its length, a checksum, the event, a checksum.
        (size,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + size])
        scalars += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
        content = content[16 + size :]
    assert [s[1:] for s in scalars if s[0] == "train/loss"] == LOSSES


def test_mlflow_files_and_a_run_that_is_continued(run: RunFolder) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.tracking import MlflowClient

    send(run, "mlflow", project="p")
    folder = send(run, "mlflow", project="p")
    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("p")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted({(each.step, each.value) for each in history}) == LOSSES
    assert found.info.status == "FINISHED"
    assert found.data.params["kfac.damping"] == "0.001"
    assert found.data.tags["event.2.resized"] == "reason a node left"


def test_wandb_offline(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = send(run, "wandb")
    wandb.teardown()  # Writes the file, which otherwise happens when the process ends.
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"kfac" in content


def test_failing_tracker_is_left_out_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers._TRACKERS, "mlflow", Broken)  # type: ignore[arg-type]
    options = [
        *("train.epochs=2", "tracking.to=[mlflow, jsonl]"),
        *(f"data.shards={tmp_path}/digits", f"tracking.folder={tmp_path}/lines"),
    ]
    sets = [word for each in options for word in ("--set", each)]
    argv = ["train", "digits", "--local", "--storage", str(tmp_path), "--name", "a", *sets]
    assert main(argv) == 0
    assert capsys.readouterr().err.count("tracker mlflow has failed and is left out") == 1
    rows = RunFolder(str(tmp_path / "a")).metrics()
    found = lines_of(tmp_path / "lines" / "a" / "values.jsonl")
    sent = [(r["step"], r["value"]) for r in found if r.get("name") == "train/loss"]
    assert sent == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    # A run that is continued sends only what is new, which is nothing here.
    assert main(argv) == 0
    again = lines_of(tmp_path / "lines" / "a" / "values.jsonl")
    assert [r for r in again if "name" in r] == [r for r in found if "name" in r]


def test_rows_that_are_computed_again_are_sent_again(run: RunFolder) -> None:
    seen: list[tuple[int, float]] = []

    class Seen(Broken):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            seen.append((step, values["train/loss"]))

    follower = tracking.Follower(run, {"seen": Seen()}, {"events.jsonl": sys.maxsize})
    follower.send()
    run.rewind_metrics(1)
    follower.send()
    run.append("metrics.jsonl", [{"step": 2, "loss": 1.5}])
    follower.send()
    assert seen == [*LOSSES, (2, 1.5)]


def test_missing_package_and_remote_run_are_refused(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*arguments: object) -> Any:
        raise ModuleNotFoundError("No module named 'wandb'", name="wandb")

    monkeypatch.setitem(trackers._TRACKERS, "wandb", absent)  # type: ignore[arg-type]
    assert main(["track", run.uri, "--to", "wandb"]) == 2
    assert "tracking.to=wandb needs wandb, which is not installed" in capsys.readouterr().err
    assert main(["track", run.uri]) == 2
    assert "no tracker is named" in capsys.readouterr().err
    config = parse_config({"tracking": {"to": ["jsonl"]}})
    with (
        pytest.raises(ConfigError, match="need a local folder"),
        tracking.tracked(config, "s3://bucket/run", "run"),
    ):
        pass


class Trials:
    """Run folders of trials whose status a test sets."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.runs = {name: RunFolder(str(folder / "trials" / name)) for name in names}
        self.status: dict[str, str | None] = dict.fromkeys(names)
        self.config = parse_config({"tracking": {"to": ["mlflow", "jsonl"]}})

    def __call__(self) -> list[tracking.TrackedTrial]:
        return [
            tracking.TrackedTrial(name, run.uri, lambda: self.config, self.status[name])
            for name, run in self.runs.items()
        ]


def test_each_trial_is_a_run_and_a_failing_tracker_stops_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "INTERVAL_S", 0.01)
    monkeypatch.setattr(trackers, "_PACKAGES", {})
    monkeypatch.setitem(trackers._TRACKERS, "mlflow", Broken)  # type: ignore[arg-type]
    trials = Trials(tmp_path, "t000", "t001", "t002")
    trials.runs["t000"].append("metrics.jsonl", ROWS)
    trials.status["t000"] = "finished"  # By an earlier call, which has sent its rows.
    trials.runs["t001"].append("metrics.jsonl", ROWS[:1])  # An earlier call began it.
    with tracking.tracked_trials(trials.config.tracking, str(tmp_path), "first", trials):
        trials.status["t001"] = ""
        trials.runs["t001"].append("metrics.jsonl", ROWS[1:])
        trials.status["t002"] = ""
        trials.runs["t002"].append("metrics.jsonl", ROWS)
        deadline = time.monotonic() + 60
        values = tmp_path / "tracking" / "t002" / "values.jsonl"
        while not values.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        trials.status["t001"] = "stopped"
    assert not (tmp_path / "tracking" / "t000").exists()
    rows = {name: lines_of(values.parents[1] / name / "values.jsonl") for name in ("t001", "t002")}
    found = {
        n: [(r["step"], r["value"]) for r in each if r.get("name") == "train/loss"]
        for n, each in rows.items()
    }
    assert found == {"t001": LOSSES[1:], "t002": LOSSES}
    assert [rows[name][-1] for name in rows] == [
        {"run": "first/t001", "event": "stopped"},
        {"run": "first/t002", "event": "interrupted"},
    ]
    assert "tracker mlflow has failed and is left out" in capsys.readouterr().err


def test_trackers_of_trials_are_checked_before_any_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers._PACKAGES, "mlflow", "no_such_package")  # type: ignore[index]
    trials = Trials(tmp_path, "t000")
    follow = tracking.tracked_trials(trials.config.tracking, str(tmp_path), "first", trials)
    with pytest.raises(ConfigError, match="needs no_such_package"), follow:
        pass
