"""Whole runs on real nodes and processes: losses, returns, kills, stops and crash loops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.in_process import train_in_process
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.cluster.run.result import RunResult
from elastic_kfac.cluster.run.trainer import train
from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.errors import DataError, RunError, UsageError
from elastic_kfac.runs.audit import AuditReport, audit_run
from elastic_kfac.state.run_folder import RunFolder
from support.preemption import drain_node

Run = Callable[..., RunResult]
Make = Callable[[int], Config]
STEPS_PER_EPOCH = 45


@dataclass(frozen=True)
class Story:
    """A run that lost a node and got it back, was interrupted, and was continued to its end; every change
    restarts its workers."""

    folder: RunFolder
    interrupted: RunResult
    interrupted_step: int
    finished: RunResult
    epochs: int
    audit: AuditReport

    def changes(self) -> list[dict[str, Any]]:
        """Events after which a group stepped."""
        kinds = ("start", "continue", "resize", "recovery")
        return [row for row in self.folder.events() if row["kind"] in kinds]


@pytest.fixture(scope="module")
def story(run: Run, config: Make, tmp_path_factory: pytest.TempPathFactory) -> Story:
    path = tmp_path_factory.mktemp("story") / "run"
    # How long a node needs to come back depends on the machine: the run goes on until it has.
    display = _InterruptWhen(lambda view: list(view.world_sizes) == [2, 1, 2], steps=60)
    endless = _changed(config(5000), "elastic.in_place", False)
    interrupted = run(endless, path, resize_at=[(100, 1), (200, 2)], progress=display)
    folder = RunFolder(path)
    step = int(folder.metrics()[-1]["step"])
    epochs = step // STEPS_PER_EPOCH + 3
    finished = run(_changed(config(epochs), "elastic.in_place", False), path)
    return Story(folder, interrupted, step, finished, epochs, audit_run(folder))


def test_run_node_lost_and_returned_steps_at_every_size(story: Story) -> None:
    assert story.finished.values["world_sizes"] == [2, 1, 2]
    assert story.finished.values["resizes"] == 2
    start, lost, returned, _ = story.changes()
    assert (start["kind"], start["from_world_size"], start["to_world_size"]) == ("start", 0, 2)
    assert (lost["kind"], lost["from_world_size"], lost["to_world_size"]) == ("recovery", 2, 1)
    assert [e["reason"] for e in story.folder.events() if e["kind"] == "failure"] == ["1 node lost"]
    assert (returned["kind"], returned["from_world_size"]) == ("resize", 1)


def test_run_planned_growth_redoes_nothing_and_a_loss_is_counted(story: Story) -> None:
    _, lost, returned, continued = story.changes()
    assert returned["steps_redone"] == 0
    assert continued["steps_redone"] == 0
    assert story.finished.values["steps_redone"] == lost["steps_redone"]
    restored = [row["steps_redone"] for row in story.folder.events() if row["kind"] == "restored"]
    assert restored == [lost["steps_redone"], 0, 0]


def test_run_resized_and_continued_used_every_sample_once(story: Story) -> None:
    assert story.audit.problems == ()
    assert story.audit.complete_epochs == story.epochs
    assert story.audit.world_sizes == (2, 1, 2)


def test_run_metrics_have_one_row_per_step(story: Story) -> None:
    steps = [row["step"] for row in story.folder.metrics() if "loss" in row]
    assert steps == list(range(1, story.epochs * STEPS_PER_EPOCH + 1))


def test_run_interrupted_ends_parked_and_the_same_name_continues(story: Story) -> None:
    assert (story.interrupted.status, story.interrupted.exit_code) == ("interrupted", 130)
    assert story.interrupted.values["steps"] == story.interrupted_step
    assert story.changes()[-1]["step"] == story.interrupted_step
    assert (story.finished.status, story.finished.exit_code) == ("finished", 0)
    assert story.finished.values["steps"] == story.epochs * STEPS_PER_EPOCH
    assert story.finished.values["best_accuracy"] >= 0.9


def test_run_with_decompositions_on_a_free_cpu_has_the_hash_of_one_without(
    run: Run, config: Make, tmp_path: Path
) -> None:
    changes = [("elastic.max_workers", 1), ("kfac.stagger", True), ("kfac.factor_update_steps", 4)]
    base = apply_overrides(config(4).model_dump(mode="json"), changes)
    alone = train_in_process(
        parse_config(base), name="alone", storage=str(tmp_path), progress=Display()
    )
    values = apply_overrides(base, [("plan.decomposers", 1)])
    result = run(parse_config(values), tmp_path / "run")
    assert result.values["final_state_sha256"] == alone.values["final_state_sha256"]
    [costs] = [row for row in RunFolder(tmp_path / "run").events() if row["kind"] == "costs"]
    assert costs["decomposed_elsewhere"] > 0


def test_run_worker_killed_on_request_recovers(run: Run, config: Make, tmp_path: Path) -> None:
    # However long the kill takes, the run does not end before it.
    display = _InterruptWhen(
        lambda view: any(row["kind"] == "recovery" for row in view.events), steps=20
    )
    result = run(config(5000), tmp_path / "run", kill_at=[(60, 1)], progress=display)

    assert (result.status, result.unfired) == ("interrupted", ())
    folder = RunFolder(tmp_path / "run")
    assert audit_run(folder).problems == ()
    events = folder.events()
    [failure] = [row for row in events if row["kind"] == "failure"]
    assert failure["reason"] == "worker process of rank 1 died"
    # In place, the world may have grown back already.
    changes = [row["steps_redone"] for row in events if row["kind"] in ("recovery", "resize")]
    assert changes == [row["steps_redone"] for row in events if row["kind"] == "restored"]
    assert [row["asked_at_step"] for row in events if row["kind"] == "fault"] == [60]


def test_run_drained_nodes_hand_over_and_a_drain_cut_short_is_a_loss(
    config: Make,
    cluster: LocalCluster,
    await_free_nodes: Callable[[int], None],
    tmp_path: Path,
) -> None:
    three = apply_overrides(config(5000).model_dump(), [("elastic.max_workers", 3)])
    cluster.add_node()
    await_free_nodes(3)
    display = _Preemptions(cluster)
    result = train(
        parse_config(three),
        name="run",
        storage=str(tmp_path),
        cluster=cluster,
        progress=display,
    )

    assert result.values["world_sizes"] == [3, 2, 1]
    folder = RunFolder(tmp_path / "run")
    events = folder.events()
    noticed, cut_short = (row for row in events if row["kind"] in ("resize", "recovery"))
    assert noticed["kind"] == "resize"
    assert f"being drained ({display.drained[0][:8]})" in noticed["reason"]
    assert "over 2 ranks" in noticed["plan"]
    assert noticed["steps_redone"] == 0
    assert (cut_short["from_world_size"], cut_short["to_world_size"]) == (2, 1)
    restored = [row for row in events if row["kind"] == "restored"]
    assert [row["steps_redone"] for row in restored] == [0, cut_short["steps_redone"]]
    steps = [row["step"] for row in folder.metrics() if "loss" in row]
    assert steps == list(range(1, result.values["steps"] + 1))
    assert audit_run(folder).problems == ()


# The two of the default, in place, are in `make test`.
@pytest.mark.soak
def test_run_same_error_at_every_attempt_ends_with_the_cause(
    run: Run, config: Make, tmp_path: Path
) -> None:
    asked = _changed(config(1), "elastic.in_place", True)
    with pytest.raises(RunError, match="ValueError: a defect of the model"):
        run(asked, tmp_path / "run", rank_function="failing_ranks:always_raises")

    folder = RunFolder(tmp_path / "run")
    _failed_so_often(folder, 3)
    reasons = [row["reason"] for row in folder.events() if row["kind"] == "restarts"]
    assert reasons == ["the rank function of this run has no form for members"]


def _failed_so_often(folder: RunFolder, times: int) -> None:
    assert len([row for row in folder.events() if row["kind"] == "failure"]) == times
    result = folder.result()
    assert result is not None
    assert result["status"] == "failed"


@pytest.mark.soak
def test_run_data_error_of_a_rank_is_not_tried_again(
    run: Run, config: Make, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"shard 3 is torn; given: train-00003\.arrow"):
        run(config(1), tmp_path / "run", rank_function="failing_ranks:finds_bad_data")

    _failed_so_often(RunFolder(tmp_path / "run"), 1)


def test_run_in_place_same_error_ends_it_after_as_many_failures(
    run: Run, config: Make, tmp_path: Path
) -> None:
    raises = _in_place(config(1), "failing_ranks:RaisesAtStepThree")
    with pytest.raises(RunError, match="ValueError: a defect of the model"):
        run(raises, tmp_path / "run")
    _failed_so_often(RunFolder(tmp_path / "run"), 3)

    bad_data = _in_place(config(1), "failing_ranks:FindsBadData")
    with pytest.raises(DataError, match=r"shard 3 is torn; given: train-00003\.arrow"):
        run(bad_data, tmp_path / "bad-data")
    _failed_so_often(RunFolder(tmp_path / "bad-data"), 1)


def _in_place(config: Config, hook: str) -> Config:
    changes = [("elastic.in_place", True), ("train.hooks", [hook])]
    return parse_config(apply_overrides(config.model_dump(), changes))


# Twenty seconds of starting for one line.
@pytest.mark.soak
def test_run_fault_after_the_end_is_reported_as_unfired(
    run: Run, config: Make, tmp_path: Path
) -> None:
    result = run(config(1), tmp_path / "run", kill_at=[(10_000, 0)])

    assert result.status == "finished"
    assert result.unfired == ("--kill-at 10000:0",)
    assert result.exit_code == 1


def test_run_unreachable_address_is_one_usage_error(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore text")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    options: dict[str, Any] = {"name": "run", "storage": str(tmp_path), "address": "auto"}
    with pytest.raises(UsageError, match="cannot connect to a Ray cluster: Could not find any"):
        train(config(1), progress=Display(), **options)


def test_run_address_where_nobody_listens_is_a_usage_error_too(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray itself would end the process.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    options: dict[str, Any] = {"name": "run", "storage": str(tmp_path), "address": "127.0.0.9:1"}
    with pytest.raises(UsageError, match=r"cannot connect to a Ray cluster: .*refused"):
        train(config(1), progress=Display(), **options)


def test_a_run_goes_from_one_process_to_the_cluster_and_back(
    run: Run, config: Make, tmp_path: Path
) -> None:
    """In reproducible mode the hash is that of a run that never left its process."""
    long = _changed(config(400), "elastic.reproducible", True)
    here = tmp_path / "moved"

    def step() -> int:
        return int(RunFolder(here).metrics()[-1]["step"])

    def local(folder: Path, config: Config, display: Display) -> RunResult:
        return train_in_process(
            config, name=folder.name, storage=str(folder.parent), progress=display
        )

    local(here, long, _InterruptWhen(lambda view: True, steps=20))
    first = step()
    run(long, here, progress=_InterruptWhen(lambda view: 2 in view.world_sizes, steps=20))
    second = step()
    end = _changed(long, "train.epochs", second // STEPS_PER_EPOCH + 2)
    moved = local(here, end, Display())
    quiet = local(tmp_path / "quiet", end, Display())

    assert 20 < first < second < moved.values["steps"]
    assert moved.values["world_sizes"] == [1, 2, 1]
    assert moved.values["final_state_sha256"] == quiet.values["final_state_sha256"]
    assert moved.values["steps_redone"] == 0


def _changed(config: Config, key: str, value: Any) -> Config:
    return parse_config(apply_overrides(config.model_dump(), [(key, value)]))


class _InterruptWhen(Display):
    """Presses Ctrl-C once: so many steps after a condition has become true."""

    def __init__(self, condition: Callable[[RunView], bool], *, steps: int) -> None:
        self._condition = condition
        self._steps = steps
        self._since: int | None = None
        self._pressed = False

    def update(self, view: RunView) -> None:
        step = int(view.progress.get("step", 0))
        if self._since is None and self._condition(view):
            self._since = step
        if self._since is not None and step >= self._since + self._steps and not self._pressed:
            self._pressed = True
            # From another thread, so that the main thread meets it wherever it happens to be.
            threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()


class _Preemptions(Display):
    """Drains a node with time, then another one that is gone at once; then presses Ctrl-C."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self.drained: list[str] = []
        self._since: dict[int, int] = {}

    def update(self, view: RunView) -> None:
        if view.state != "running" or not view.world_sizes:
            return
        step = int(view.progress.get("step", 0))
        size = view.world_sizes[-1]
        steps = step - self._since.setdefault(size, step)
        if size == 3 and steps >= 40 and not self.drained:
            self._drain(self._cluster.nodes[-1], deadline_s=600)
        elif size == 2 and steps >= 40 and len(self.drained) == 1:
            self._cluster.remove_node(self._cluster.nodes[-1])
            last = self._cluster.nodes[-1]
            self._drain(last, deadline_s=1)
            self._cluster.remove_node(last)
        elif size == 1 and steps >= 40:
            self._since[1] = step + 10**9
            # From another thread, so that the main thread meets it wherever it happens to be.
            threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    def _drain(self, index: int, *, deadline_s: float) -> None:
        self.drained.append(self._cluster.node_id(index))
        drain_node(self._cluster, index, deadline_s=deadline_s)
