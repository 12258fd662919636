"""A trial's checkpoint and clone without a cluster, and what is read from /proc."""

from __future__ import annotations

import json
import os
import queue
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.shards import make_shards
from elastic_kfac.experiments.search_space import SearchSpace, parse_space
from elastic_kfac.experiments.search_trial import (
    PERTURBED,
    ProcessMeter,
    StopRequest,
    TrialRun,
    TrialSettings,
    _LiveRun,
    process_usage,
    read_extras,
    write_extras,
)
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import METRICS, RunFolder
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import Callback, KeepGoing
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.rank import RankTrainer


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> SearchSpace:
    root = tmp_path_factory.mktemp("data") / "digits"
    make_shards("digits", root)
    return parse_space(
        {
            "base": {
                "data": {"shards": str(root)},
                "train": {"global_batch_size": 256, "torch_threads": 1},
                "optimizer": {"lr": 0.02},
                "kfac": {"damping": 0.01, "kl_clip": 1e-4},
                "elastic": {"snapshot_interval_s": 1e6},
            },
            "parameters": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}},
            "objective": {"target_accuracy": 1.0},
            "budget": {"epochs": 1},
            "scheduler": {"name": "pb2"},
        }
    )


def trial(space: SearchSpace, folder: Path, name: str, lr: float, perturbed: float | None) -> Any:
    """A trainable as Ray Tune has it after `setup`, without an actor around it."""
    made = object.__new__(TrialRun)
    config: dict[str, Any] = {
        "assignment": {
            "trial": name,
            "stage": "search",
            "point": {"optimizer.lr": lr},
            "seed": 0,
        }
    }
    if perturbed is not None:
        config[PERTURBED + "optimizer.lr"] = perturbed
    made.setup(config, TrialSettings(space, str(folder), broker=None))
    return made


class _Rows(Callback):
    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_metrics(self, row: Any) -> None:
        self._folder.append(METRICS, [row])


def train_here(config: Config, folder: Path) -> None:
    run = RunFolder(folder)
    run.write_config(config)
    run_rank(
        config,
        Communicator.solo(),
        store=CheckpointStore(folder),
        callback=_Rows(run),
        control=KeepGoing(),
    )


def test_perturbed_value_replaces_the_one_of_the_point(space: SearchSpace, tmp_path: Path) -> None:
    plain = trial(space, tmp_path, "a", 0.05, None)
    perturbed = trial(space, tmp_path, "b", 0.05, -3.0)
    assert plain._config.optimizer.lr == 0.05
    assert perturbed._config.optimizer.lr == pytest.approx(1e-3)


def test_clone_goes_on_from_the_donors_weights_momentum_and_curvature(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = trial(space, tmp_path, "donor", 0.02, None)
    clone = trial(space, tmp_path, "clone", 1e-4, -3.0)
    folders = {name: tmp_path / "trials" / name for name in ("donor", "clone")}
    train_here(donor._config, folders["donor"])
    train_here(clone._config, folders["clone"])
    given = CheckpointStore(folders["donor"]).load_latest()
    former = CheckpointStore(folders["clone"]).load_latest()
    assert given is not None
    assert former is not None

    donor.save_checkpoint(str(tmp_path / "checkpoint"))
    clone.load_checkpoint(str(tmp_path / "checkpoint"))

    restored: list[TrainingState] = []
    original = RankTrainer.restore

    def restore(trainer: RankTrainer, state: TrainingState) -> None:
        original(trainer, state)
        restored.append(trainer.capture())

    monkeypatch.setattr(RankTrainer, "restore", restore)
    longer = clone._config.model_copy(
        update={"train": clone._config.train.model_copy(update={"epochs": 1.5})}
    )
    train_here(longer, folders["clone"])
    [live] = restored
    parts = {"model", "optimizer", "kfac"}
    assert {name.split("/")[0] for name in live.tensors} >= parts
    assert live.tensors.keys() == given.tensors.keys()
    assert all(torch.equal(live.tensors[name], given.tensors[name]) for name in given.tensors)
    changed = {
        n.split("/")[0] for n, t in given.tensors.items() if not torch.equal(former.tensors[n], t)
    }
    assert changed >= parts
    assert live.progress == given.progress
    rows = RunFolder(folders["clone"])
    [event] = [row for row in rows.events() if row["kind"] == "cloned"]
    assert (event["parent"], event["step"]) == ("donor", given.progress.step)
    assert read_extras(folders["clone"])["parent"] == "donor"
    losses = [row["loss"] for row in rows.metrics() if "loss" in row]
    donors = [row["loss"] for row in RunFolder(folders["donor"]).metrics() if "loss" in row]
    assert losses[: len(donors)] == donors
    assert len(losses) > len(donors)


def test_own_checkpoint_leaves_a_trial_as_it_is(space: SearchSpace, tmp_path: Path) -> None:
    own = trial(space, tmp_path, "own", 0.02, None)
    folder = tmp_path / "trials" / "own"
    RunFolder(folder).append(METRICS, [{"step": 1, "loss": 1.0}])
    own.save_checkpoint(str(tmp_path / "checkpoint"))
    RunFolder(folder).append(METRICS, [{"step": 2, "loss": 0.5}])
    own.load_checkpoint(str(tmp_path / "checkpoint"))
    assert [row["step"] for row in RunFolder(folder).metrics()] == [1, 2]
    assert RunFolder(folder).events() == []


def ended_run(space: SearchSpace, folder: Path, result: Any, error: Any, wish: str | None) -> Any:
    run = object.__new__(_LiveRun)
    run._rows, run._in_rounds = queue.SimpleQueue(), False
    run._last = {"value": 0.4, "best_value": 0.5, "epoch": 1.0}
    run._config, run._settings = space.config({}, 0), SimpleNamespace(space=space)
    run._folder = folder
    run._result, run._error = result, error
    run._stop = StopRequest()
    if wish is not None:
        run._stop.ask(wish)
    run._display = SimpleNamespace(extras=lambda: {"cpu_seconds": 1.0})
    run._thread = SimpleNamespace(is_alive=lambda: False)
    return run


@pytest.mark.parametrize(
    ("status", "values", "wish", "ended"),
    [
        ("finished", {"train_time_to_accuracy_s": 3.0}, None, "target"),
        ("finished", {"best_value": 0.7}, None, "budget"),
        ("interrupted", {}, "the budget is used up", "budget"),
        ("interrupted", {"train_time_to_accuracy_s": 3.0}, "SIGINT", "target"),
        ("interrupted", {}, "SIGINT", "interrupted"),
    ],
)
def test_end_of_a_run_says_how_it_ended(
    space: SearchSpace, tmp_path: Path, status: str, values: Any, wish: str | None, ended: str
) -> None:
    result = SimpleNamespace(status=status, values=values)
    row = ended_run(space, tmp_path, result, None, wish).next_result()
    assert (row["ended"], row["done"]) == (ended, True)
    assert row["best_value"] == values.get("best_value", 0.5)


def test_failed_run_is_a_result_with_its_cause(space: SearchSpace, tmp_path: Path) -> None:
    run = ended_run(space, tmp_path, None, ValueError("torn"), None)
    row = run.next_result()
    assert (row["ended"], row["cause"]) == ("failed", "ValueError('torn')")
    assert read_extras(tmp_path)["cause"] == "ValueError('torn')"


def test_evaluation_at_the_target_is_not_passed_on_before_the_end(
    space: SearchSpace, tmp_path: Path
) -> None:
    result = SimpleNamespace(status="finished", values={"train_time_to_accuracy_s": 1.0})
    run = ended_run(space, tmp_path, result, None, None)
    run._rows.put({"value": 0.6, "epoch": 0.5})
    run._rows.put({"value": 1.0, "epoch": 0.75})
    assert run.next_result()["ended"] == ""
    last = run.next_result()
    assert (last["ended"], last["best_value"]) == ("target", 1.0)


def test_process_meter_counts_from_first_look_and_goes_blind_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [
        {"NodeID": "here", "NodeManagerHostname": socket.gethostname()},
        {"NodeID": "there", "NodeManagerHostname": "elsewhere"},
    ]
    monkeypatch.setattr("elastic_kfac.experiments.search_trial.ray.nodes", lambda: nodes)

    def view(node: str, state: str = "running") -> Any:
        return SimpleNamespace(state=state, pids={0: os.getpid()}, rank_nodes={0: node})

    meter = ProcessMeter(cpu_seconds=10.0)
    meter.look(view("here", "starting"))
    assert meter.peak_memory_bytes is None
    meter.look(view("here"))
    begin, _ = process_usage(os.getpid())
    while (now := process_usage(os.getpid())[0]) is not None and now - (begin or 0) < 0.05:
        sum(range(10_000))
    meter.look(view("here"))
    assert meter.cpu_seconds is not None
    assert 10.04 <= meter.cpu_seconds < 20
    assert meter.peak_memory_bytes is not None
    assert meter.peak_memory_bytes > 10e6
    meter.look(view("there"))
    assert meter.cpu_seconds is None


def test_extras_of_a_run_that_has_none_are_empty(tmp_path: Path) -> None:
    assert read_extras(tmp_path) == {}
    write_extras(tmp_path / "new", {"a": 1})
    assert json.loads((tmp_path / "new" / "tuning.json").read_text()) == {"a": 1}
