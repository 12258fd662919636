"""A world that grows, hands over, loses members and takes them back, in living processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ray

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.cluster.run.result import RunResult
from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.state.run_folder import RunFolder
from support.preemption import drain_node


def test_run_in_place_survivors_step_on_whoever_comes_leaves_or_dies(
    run: Callable[..., RunResult],
    config: Callable[[int], Config],
    cluster: LocalCluster,
    tmp_path: Path,
) -> None:
    changes = [("elastic.in_place", True), ("elastic.max_workers", 3)]
    display = _OneChangeAfterTheOther(cluster, RunFolder(tmp_path / "run"))
    result = run(
        parse_config(apply_overrides(config(5000).model_dump(), changes)),
        tmp_path / "run",
        progress=display,
    )

    assert result.status == "interrupted" and result.is_safe
    assert result.values["world_sizes"] == [2, 3, 2, 1, 2, 1]
    folder = RunFolder(tmp_path / "run")
    events = folder.events()
    changes_of_world = [row for row in events if row["kind"] in ("recovery", "resize")]
    assert [row["kind"] for row in changes_of_world] == [
        *("resize", "resize"),
        *("recovery", "resize", "recovery"),
    ]
    assert all(row["in_place"] for row in changes_of_world)
    planned = [row for row in changes_of_world if row["kind"] == "resize"]
    # Whoever joins receives the state of that boundary, whoever leaves hands over at one.
    assert [(row["steps_redone"], row["way"]) for row in planned] == [(0, "resize")] * 3
    assert [row["moved_bytes"] > 0 for row in planned] == [True, False, True]
    assert "node being drained" in planned[1]["reason"]
    failures = [row["reason"] for row in events if row["kind"] == "failure" and row["in_place"]]
    assert failures[0] == "worker process of rank 0 died"
    assert "1 node lost" in failures
    # The failures before have said why; pauses for a change are no events of their own.
    assert {row["reason"] for row in changes_of_world if row["kind"] == "recovery"} == {None}
    assert len([row for row in events if row["kind"] == "parked"]) == 1
    assert not [row for row in events if row["kind"] == "fallback"]
    # One process was there all the time.
    assert set.intersection(*(set(pids.values()) for pids in display.pids))
    steps = [row["step"] for row in folder.metrics() if "loss" in row]
    assert steps == list(range(1, result.values["steps"] + 1))
    assert audit_run(folder).problems == ()


def test_run_whose_supervisor_is_lost_begins_again_in_the_same_places(
    run: Callable[..., RunResult],
    config: Callable[[int], Config],
    cluster: LocalCluster,
    tmp_path: Path,
) -> None:
    settings = parse_config(
        apply_overrides(config(5000).model_dump(), [("elastic.in_place", True)])
    )
    result = run(settings, tmp_path / "run", progress=_LosesItsSupervisor(cluster))

    assert result.status == "interrupted" and result.is_safe
    folder = RunFolder(tmp_path / "run")
    failures = [row["reason"] for row in folder.events() if row["kind"] == "failure"]
    assert failures == ["the supervisor of the workers was lost"]
    steps = [row["step"] for row in folder.metrics() if "loss" in row]
    assert steps == list(range(1, result.values["steps"] + 1))
    assert audit_run(folder).problems == ()
    deadline = time.monotonic() + 60
    while places := _places_in_use():
        assert time.monotonic() < deadline, places
        time.sleep(0.2)


def _places_in_use() -> list[str]:
    table = ray.util.placement_group_table().values()
    return [group["name"] for group in table if group["state"] != "REMOVED"]


class _LosesItsSupervisor(Display):
    """Kills Ray Train's worker after some steps of both ranks; presses Ctrl-C once they step again."""

    def __init__(self, cluster: LocalCluster, steps: int = 20) -> None:
        self._cluster, self._steps = cluster, steps
        self._attempt, self._since = 1, 0

    def update(self, view: RunView) -> None:
        step = int(view.progress.get("step", 0))
        if view.state != "running" or view.world_size != 2 or view.attempt != self._attempt:
            self._since = step
        elif step >= self._since + self._steps:
            self._attempt += 1
            if self._attempt == 2:
                self._kill_supervisor()
            else:
                threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    def _kill_supervisor(self) -> None:
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                title = (folder / "cmdline").read_bytes()
                if title.startswith(b"ray::RayTrainWorker"):
                    # Only this cluster's own processes can be killed.
                    with contextlib.suppress(Exception):
                        self._cluster.kill_worker(int(folder.name))


class _OneChangeAfterTheOther(Display):
    """Adds a node, drains one, kills a rank, and loses a node, each some steps after the change before;
    then presses Ctrl-C once Ray has told of the node. One process is never touched."""

    def __init__(self, cluster: LocalCluster, folder: RunFolder, steps: int = 20) -> None:
        self._cluster = cluster
        self._folder = folder
        self._steps = steps
        self._worlds, self._since = 0, 0
        self.pids: list[dict[int, int]] = []
        """Process of every rank before each change."""

    def update(self, view: RunView) -> None:
        step = int(view.progress.get("step", 0))
        if len(view.world_sizes) > self._worlds:
            self._worlds, self._since = len(view.world_sizes), step
        world_size = view.world_sizes[-1] if view.world_sizes else 0
        if step < self._since + self._steps or len(view.pids) != world_size:
            return
        # Ours alone is not enough: the replacement comes of itself.
        actions = {1: self._grow, 2: self._drain, 3: self._kill, 5: self._lose, 6: self._stop}
        action = actions.pop(self._worlds, None)
        if action == self._stop and not self._is_explained():
            return  # the survivor may step before anybody knows why it is alone
        if action is not None and len(self.pids) < self._worlds:
            self.pids += [dict(view.pids)] * (self._worlds - len(self.pids))
            action(view)

    def _grow(self, view: RunView) -> None:
        self._cluster.add_node(wait=False)

    def _drain(self, view: RunView) -> None:
        drain_node(self._cluster, self._index(view.rank_nodes[2]), deadline_s=600)

    def _kill(self, view: RunView) -> None:
        # Rank 0: another one takes over.
        self._cluster.kill_worker(view.pids[0])

    def _lose(self, view: RunView) -> None:
        self._cluster.remove_node(self._index(view.rank_nodes[1]))

    def _is_explained(self) -> bool:
        return sum(row["kind"] == "failure" for row in self._folder.events()) == 2

    def _stop(self, view: RunView) -> None:
        # From another thread, so that the main thread meets it wherever it happens to be.
        threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    def _index(self, node_id: str) -> int:
        return next(i for i in self._cluster.nodes if self._cluster.node_id(i) == node_id)
