"""Searches on real nodes: growth, refusals, failures, a killed driver, and states that change hands."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from safetensors.torch import load_file

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run.in_process import train_in_process
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.config import Config, apply_overrides, parse_config, read_config
from elastic_kfac.errors import UsageError
from elastic_kfac.experiments.resource_broker import shares
from elastic_kfac.experiments.search_folder import SearchFolder
from elastic_kfac.experiments.search_runner import SearchResult, search
from elastic_kfac.experiments.search_space import SearchSpace, parse_space
from elastic_kfac.experiments.searcher import planned_points
from elastic_kfac.reports.search_page import write_search_page
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from support.lines import SilentLine

Make = Callable[[int], Config]

# A search starts several groups one after another, each of which takes a busy machine a minute.
pytestmark = pytest.mark.timeout(900)


def space_of(base: Config, changes: dict[str, Any], **parts: Any) -> SearchSpace:
    values = apply_overrides(base.model_dump(mode="json"), list(changes.items()))
    return parse_space({"base": values, "references": {}, **parts})


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "trials.csv").open(encoding="utf-8") as stream:
        return {row["trial_id"]: row for row in csv.DictReader(stream)}


def placement_groups_in_use() -> list[str]:
    table = ray.util.placement_group_table()
    return [name for name, group in table.items() if group["state"] != "REMOVED"]


# ---- a search with everything in it -------------------------------------------------------------


@pytest.fixture(scope="module")
def story_space(config: Make) -> SearchSpace:
    return space_of(
        config(5000),
        {"train.eval_every_epochs": 1, "tracking.to": ["jsonl"]},
        parameters={
            "kfac.damping": {"grid": [0.01, 0.9]},
            # Neither bound of the last two is reached: one training for both.
            "plan.memory_budget_gib": {"grid": [1e-6, 1.0, 2.0]},
        },
        objective={"target_accuracy": 1.0},
        budget={"epochs": 5000},
        scheduler={"name": "asha", "grace": 5000},
        searcher={"name": "grid"},
        repeats=2,
        max_concurrent=2,
    )


@pytest.fixture(scope="module")
def story(
    session_cluster: LocalCluster,
    story_space: SearchSpace,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[SearchResult, list[str]]:
    """Two of six points are refused, two share the training of another, of which one fails, and the other
    gets the room that becomes free, and then its second seed."""
    said: list[str] = []
    result = search(
        story_space,
        name="story",
        write_page=write_search_page,
        storage=str(tmp_path_factory.mktemp("search")),
        cluster=session_cluster,
        display=SilentLine(said),
        rank_function="recording_ranks:ends_once_grown",
    )
    return result, said


def test_search_ends_each_trial_as_it_should(story: tuple[SearchResult, list[str]]) -> None:
    result, said = story
    assert (result.status, result.exit_code) == ("finished", 0)
    rows = rows_of(result.folder)
    assert {name: row["status"] for name, row in rows.items()} == {
        "t000-s0": "refused",
        "t001-s0": "finished",
        "t002-s0": "shared",
        "t003-s0": "refused",
        "t004-s0": "failed",
        "t005-s0": "shared",
        # Only what has finished is worth another seed.
        "t001-s1": "finished",
    }
    for refused in (rows["t000-s0"], rows["t003-s0"]):
        assert "plan.memory_budget_gib=1e-06" in refused["reason"]
        assert not (result.folder / "trials" / refused["trial_id"]).exists()
    assert "shard 3 is torn" in rows["t004-s0"]["reason"]
    assert any("t004-s0 failed: shard 3 is torn" in line for line in said)
    for shared, trained in (("t002-s0", "t001-s0"), ("t005-s0", "t004-s0")):
        assert rows[shared]["reason"].startswith(f"same training as {trained}: plan.memory_budget")
        assert not (result.folder / "trials" / shared).exists()


def test_search_running_trial_grew_when_the_other_had_ended(
    story: tuple[SearchResult, list[str]],
) -> None:
    result, _ = story
    run = RunFolder(result.folder / "trials" / "t001-s0").result() or {}
    assert run["world_sizes"] == [1, 2]
    assert run["steps_redone"] == 0


def test_search_second_seed_starts_when_the_first_has_ended(
    story: tuple[SearchResult, list[str]],
) -> None:
    result, _ = story
    rows = rows_of(result.folder)
    assert float(rows["t001-s1"]["started"]) >= float(rows["t001-s0"]["ended"])
    assert int(rows["t001-s1"]["seed"]) == int(rows["t001-s0"]["seed"]) + 1


def test_search_counts_what_the_best_trial_took(story: tuple[SearchResult, list[str]]) -> None:
    result, _ = story
    rows = rows_of(result.folder)
    slower = max("t001-s0", "t001-s1", key=lambda name: float(rows[name]["objective"]))
    row = rows[slower]
    run = RunFolder(result.folder / row["run_folder"]).result() or {}
    assert row["reached"] == "true"
    assert float(row["objective"]) == run["train_time_to_accuracy_s"]
    assert float(row["cpu_seconds"]) > 0
    assert float(row["peak_memory_bytes"]) > 50e6
    experiment = json.loads((result.folder / "experiment.json").read_text())
    assert (experiment["best"], experiment["status"]) == (slower, "finished")


def test_search_best_config_is_one_that_train_takes(
    story: tuple[SearchResult, list[str]], tmp_path: Path
) -> None:
    result, _ = story
    path = result.folder / "best_config.yaml"
    config = read_config(path)
    assert config.kfac.damping == 0.01
    assert config.model_dump(mode="json") == yaml.safe_load(path.read_text())
    assert not config.train.stop_at_target
    short = parse_config(apply_overrides(config.model_dump(), [("train.epochs", 1)]))
    trained = train_in_process(short, name="best", storage=str(tmp_path), progress=Display())
    assert (trained.status, trained.values["steps"]) == ("finished", 45)


def test_search_leaves_a_report_and_tensorboard_events(
    story: tuple[SearchResult, list[str]],
) -> None:
    result, _ = story
    assert (result.folder / "report.html").stat().st_size > 1000
    assert list(result.folder.glob("tune/t001-s0/events.out.tfevents.*"))


def test_search_called_again_after_its_end_starts_nothing(
    story: tuple[SearchResult, list[str]], story_space: SearchSpace, session_cluster: LocalCluster
) -> None:
    result, said = story
    assert sum("Trials run 2 at a time" in line for line in said) == 1
    times = [
        (row["status"], row["started"], row["ended"]) for row in rows_of(result.folder).values()
    ]
    again: list[str] = []
    ended = search(
        story_space,
        name="story",
        write_page=write_search_page,
        storage=str(result.folder.parent),
        cluster=session_cluster,
        display=SilentLine(again),
    )
    assert (ended.status, ended.best) == ("finished", result.best)
    rows = rows_of(result.folder).values()
    assert [(row["status"], row["started"], row["ended"]) for row in rows] == times
    assert "Search story exists: continuing it after 7 trials." in again
    assert not any("at a time" in line for line in again)


def test_search_trials_are_runs_of_their_own_for_trackers(
    story: tuple[SearchResult, list[str]],
) -> None:
    result, _ = story
    root = result.folder / "tracking"
    assert {path.name for path in root.iterdir()} == {"t001-s0", "t001-s1", "t004-s0"}
    for name, end in (("t001-s0", "finished"), ("t001-s1", "finished"), ("t004-s0", "failed")):
        lines = (root / name / "values.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert {row["run"] for row in rows} == {f"story/{name}"}
        assert rows[-1] == {"run": f"story/{name}", "event": end}
        sent = {(row["step"], row["value"]) for row in rows if row.get("name") == "train/loss"}
        written = RunFolder(result.folder / "trials" / name).metrics()
        assert {(row["step"], row["loss"]) for row in written if "loss" in row} <= sent


def test_search_leaves_no_placement_group(story: tuple[SearchResult, list[str]]) -> None:
    deadline = time.monotonic() + 60
    while placement_groups_in_use() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert placement_groups_in_use() == []


# ---- a driver that is killed --------------------------------------------------------------------

_DRIVER = """
import json, sys
from elastic_kfac.experiments.search_runner import search
from elastic_kfac.experiments.search_space import parse_space
if __name__ == "__main__":
    space = parse_space(json.loads(open(sys.argv[1]).read()))
    search(
        space,
        name="killed",
        write_page=lambda folder: None,
        storage=sys.argv[2],
        address=sys.argv[3],
        rank_function=sys.argv[4],
    )
"""


# Four groups, one after another.
@pytest.mark.soak
def test_search_killed_and_then_interrupted_continues_its_trials(
    cluster: LocalCluster, config: Make, tmp_path: Path
) -> None:
    space = space_of(
        config(5000),
        {
            "elastic.max_workers": 1,
            "elastic.checkpoint_interval_s": 0.1,
            "train.eval_every_epochs": 1,
        },
        parameters={"kfac.damping": {"loguniform": [0.01, 0.02]}},
        objective={"target_accuracy": 1.0},
        budget={"epochs": 5000},
        searcher={"name": "optuna"},
        num_trials=2,
        prune=False,  # the second one trains for as long as this test needs
    )
    (tmp_path / "space.json").write_text(space.model_dump_json())
    (tmp_path / "driver.py").write_text(_DRIVER)
    folder = tmp_path / "killed"
    ranks = "recording_ranks:second_trial_ends_when_told"
    driver = subprocess.Popen(
        [sys.executable, "driver.py", "space.json", str(tmp_path), cluster.address, ranks],
        cwd=tmp_path,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 600
        while not list(folder.glob("trials/t001/checkpoints/*/manifest.json")):
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    before = rows_of(folder)
    assert [row["status"] for row in before.values()] == ["finished", "running"]

    def again(space: SearchSpace) -> SearchResult:
        return search(
            space,
            name="killed",
            write_page=_no_page,
            storage=str(tmp_path),
            cluster=cluster,
            display=SilentLine(),
            rank_function=ranks,
        )

    with pytest.raises(UsageError, match="exists with another space"):
        again(space.model_copy(update={"repeats": 3}))
    trial = RunFolder(folder / "trials/t001")
    with signal_once(signal.SIGINT, lambda: _restored(trial)):
        interrupted = again(space)
    assert (interrupted.status, interrupted.exit_code) == ("interrupted", 130)
    row = rows_of(folder)["t001"]
    assert row["status"] == "pending"
    assert "SIGINT" in row["reason"]
    parked = trial.metrics()[-1]["step"]

    (folder / "finish").touch()
    result = again(space)

    assert [row.status for row in result.trials] == ["finished", "finished"]
    after = rows_of(folder)
    assert after["t000"] == before["t000"]
    after_kill, after_interrupt = _restored(trial)
    assert after_interrupt == parked
    assert 0 < after_kill <= parked <= float(after["t001"]["steps"])
    assert json.loads((folder / "experiment.json").read_text())["status"] == "finished"


def _restored(trial: RunFolder) -> list[int]:
    return [int(row["step"]) for row in trial.events() if row["kind"] == "restored"]


@contextlib.contextmanager
def signal_once(number: signal.Signals, condition: Callable[[], Any]) -> Iterator[None]:
    """Sends this process a signal when the condition holds; never after the block."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            if condition():
                os.kill(os.getpid(), number)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _no_page(folder: Path) -> None:
    return None


# ---- PB2 ----------------------------------------------------------------------------------------


# A minute and a half; its rounds are played without a cluster in tests/unit/experiments.
@pytest.mark.soak
def test_search_pb2_clone_trains_on_from_its_donors_whole_state(
    cluster: LocalCluster, config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The states that were passed on are compared below; the end of a search deletes them.
    monkeypatch.setattr(SearchFolder, "drop_tune_checkpoints", lambda folder: None)
    space = space_of(
        config(4),
        {"elastic.max_workers": 1, "train.eval_every_epochs": 2},
        parameters={"optimizer.lr": {"loguniform": [1e-6, 2e-2]}},
        objective={"target_accuracy": 1.0},
        budget={"epochs": 4},
        scheduler={"name": "pb2", "interval": 2, "quantile": 0.5},
        num_trials=2,
        max_concurrent=2,
    )
    result = search(
        space,
        name="pb2",
        write_page=write_search_page,
        storage=str(tmp_path),
        cluster=cluster,
        display=SilentLine(),
        rank_function="recording_ranks:records_what_it_restores",
    )

    [clone] = [row for row in result.trials if row.parent]
    [donor] = [row for row in result.trials if not row.parent]
    assert clone.parent == donor.id
    own = result.folder / "trials" / clone.id
    [event] = [row for row in RunFolder(own).events() if row["kind"] == "cloned"]
    # Both waited at the evaluation that they were judged by; parking takes one step.
    step = event["step"]
    assert step == 2 * 45 + 1

    restored = load_file(own / f"restored-{step:06d}.safetensors")
    given = _checkpoint_of(result.folder, donor.id, step)
    former = _checkpoint_of(result.folder, clone.id, step)
    assert {name.split("/")[0] for name in given} >= {"model", "optimizer", "kfac"}
    assert restored.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(restored[name], tensor), name
    different = [name for name in given if not torch.equal(former[name], given[name])]
    assert {name.split("/")[0] for name in different} >= {"model", "optimizer", "kfac"}
    # It trains on from there, to the end of the budget.
    steps = [row["step"] for row in RunFolder(own).metrics() if "loss" in row]
    assert steps == list(range(1, 4 * 45 + 1))
    assert clone.parameters != planned_points(space)[int(clone.point)]


def _checkpoint_of(folder: Path, trial: str, step: int) -> dict[str, torch.Tensor]:
    """The state in the checkpoint that Ray Tune keeps of a trial."""
    for path in sorted((folder / "tune" / trial).glob("checkpoint_*")):
        store = CheckpointStore(path)
        if step in store.steps():
            return dict(store.load(step).tensors)
    raise AssertionError(f"Ray Tune has no checkpoint of {trial} at step {step}")


# ---- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "slots", "live", "waiting", "expected"),
    [
        (4, 2, ["a"], 3, {"a": 2}),  # the other place stays free for those who wait
        (4, 2, ["a"], 0, {"a": 4}),
        (5, 2, ["a", "b"], 7, {"a": 3, "b": 2}),
        (5, 3, ["a", "b"], 0, {"a": 3, "b": 2}),
        (1, 1, ["a", "b"], 0, {"a": 1, "b": 0}),
        (0, 2, ["a"], 0, {"a": 0}),
        (3, 2, [], 2, {}),
    ],
)
def test_shares_never_exceed_the_room(
    room: int, slots: int, live: list[str], waiting: int, expected: dict[str, int]
) -> None:
    found = shares(room, slots, live, waiting)
    assert found == expected
    assert sum(found.values()) <= room


def test_planned_points_are_the_same_every_time_and_inside_the_bounds(config: Make) -> None:
    space = space_of(
        config(1),
        {},
        parameters={
            "kfac.damping": {"loguniform": [1e-3, 1e-1]},
            "kfac.inverse_update_steps": {"randint": [3, 5]},
            "kfac.method": {"choice": ["eigen", "inverse"]},
        },
        objective={"target_accuracy": 0.5},
        budget={"epochs": 1},
        num_trials=50,
    )
    points = planned_points(space)
    assert points == planned_points(space)
    assert {point["kfac.inverse_update_steps"] for point in points} == {3, 4, 5}
    assert {point["kfac.method"] for point in points} == {"eigen", "inverse"}
    assert all(1e-3 <= point["kfac.damping"] <= 1e-1 for point in points)
    json.dumps(points)
