"""Faults x targets on a real cluster of three nodes: the run goes on, and no sample is lost or repeated.

A drain cannot be cancelled in Ray 2.60 (there is no call for it); the cell next to it is a drained node
that never goes away. The cell with a real autoscaler is left out: its test cluster ends other clusters.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.cluster.run.result import CHANGES
from elastic_kfac.cluster.run.trainer import train
from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.errors import RunError
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.state.run_folder import RunFolder
from support.preemption import drain_node

NODES = 3
TARGETS = {"rank0": 0, "owner": 1, "last": 2}
"""With a column per rank every rank owns decompositions; rank 1 is neither first nor last."""


@dataclass(frozen=True)
class Stage:
    """Once so many workers have taken enough steps, in a world that came after the last action."""

    size: int
    act: Callable[[RunView], None]
    new_world: bool = True


class Play(Display):
    """Acts at the stages of a cell, then presses Ctrl-C."""

    def __init__(self, stages: Sequence[Stage], steps: int = 25) -> None:
        self._stages = [*stages]
        self._steps = steps
        self._worlds = self._worlds_at_action = 0
        self._since: tuple[int, int] | None = None
        self.acted_at: list[float] = []

    def update(self, view: RunView) -> None:
        self._worlds += sum(row["kind"] in CHANGES for row in view.events)
        if not self._stages:
            return
        stage = self._stages[0]
        step = int(view.progress.get("step", 0))
        fits = view.state == "running" and view.world_size == stage.size and step > 0
        if not fits or (stage.new_world and self._worlds <= self._worlds_at_action):
            self._since = None
            return
        if self._since is None or self._since[0] != self._worlds:
            self._since = (self._worlds, step)
        if step >= self._since[1] + self._steps:
            self._stages.pop(0)
            self._worlds_at_action, self._since = self._worlds, None
            self.acted_at.append(time.time())
            stage.act(view)


def interrupt(view: RunView) -> None:
    # From another thread, so that the main thread meets it wherever it happens to be.
    threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()


class Cell:
    """The actions of the cells, on nodes and processes of one cluster."""

    def __init__(self, cluster: LocalCluster, target: int) -> None:
        self._cluster = cluster
        self._target = target

    def stages(self, fault: str) -> list[Stage]:
        back = [Stage(2, self.add_node), Stage(3, interrupt)]
        whole = [Stage(3, interrupt)]
        return {
            "kill": [Stage(3, self.kill), *whole],
            "hang": [Stage(3, self.stop), *whole],
            "node_loss": [Stage(3, self.lose_node), *back],
            "drain_long": [Stage(3, self.drain), *back],
            "drain_short": [Stage(3, self.drain_and_lose), *back],
            "replicas_lost": [Stage(3, self.end_replicas), Stage(3, interrupt, new_world=False)],
            "buddies_lost": [Stage(3, self.lose_buddies), *whole],
            "controller_lost": [Stage(3, self.end_controller)],
            "flapping": [
                Stage(3, self.lose_node),
                Stage(2, self.add_node),
                Stage(3, self.lose_newest_node),
                *back,
            ],
        }[fault]

    def kill(self, view: RunView) -> None:
        self._cluster.kill_worker(view.pids[self._target])

    def stop(self, view: RunView) -> None:
        os.kill(view.pids[self._target], signal.SIGSTOP)

    def lose_node(self, view: RunView) -> None:
        self._cluster.remove_node(self._node_of(view, self._target))

    def lose_newest_node(self, view: RunView) -> None:
        self._cluster.remove_node(self._cluster.nodes[-1])

    def add_node(self, view: RunView) -> None:
        self._cluster.add_node()

    def drain(self, view: RunView) -> None:
        drain_node(self._cluster, self._node_of(view, self._target), deadline_s=600)

    def drain_and_lose(self, view: RunView) -> None:
        node = self._node_of(view, self._target)
        drain_node(self._cluster, node, deadline_s=1)
        self._cluster.remove_node(node)

    def end_replicas(self, view: RunView) -> None:
        assert self._end_actors("ReplicaActor")

    def lose_buddies(self, view: RunView) -> None:
        self.end_replicas(view)
        self.kill(view)

    def end_controller(self, view: RunView) -> None:
        assert self._end_actors("TrainController")

    def _node_of(self, view: RunView, rank: int) -> int:
        return next(
            index
            for index in self._cluster.nodes
            if self._cluster.node_id(index) == view.rank_nodes[rank]
        )

    def _end_actors(self, name: str) -> int:
        ended = 0
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, RuntimeError, Exception):
                title = (folder / "cmdline").read_bytes()
                if title.startswith(b"ray::" + name.encode()):
                    self._cluster.kill_worker(int(folder.name))
                    ended += 1
        return ended


CELLS = [
    ("kill", "rank0"),
    ("kill", "owner"),
    ("kill", "last"),
    ("hang", "last"),
    ("node_loss", "rank0"),
    ("node_loss", "owner"),
    ("node_loss", "last"),
    ("drain_long", "rank0"),
    ("drain_long", "last"),
    ("drain_short", "owner"),
    ("replicas_lost", "rank0"),
    ("buddies_lost", "rank0"),
    ("buddies_lost", "owner"),
    ("controller_lost", "rank0"),
    ("flapping", "last"),
]


@pytest.mark.parametrize(
    ("fault", "target"),
    CELLS,
    ids=["-".join(cell) for cell in CELLS],
)
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_cell_run_goes_on_and_every_sample_counts_once(
    config: Callable[[int], Config],
    cluster: LocalCluster,
    await_free_nodes: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    target: str,
) -> None:
    if fault == "hang":
        # As users have it.
        monkeypatch.delenv("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S")
    changes = [
        ("elastic.max_workers", NODES),
        # Every rank keeps a part of the second-order state for itself.
        ("kfac.grad_worker_frac", 0.01),
    ]
    settings = parse_config(apply_overrides(config(5000).model_dump(), changes))
    cluster.add_node()
    await_free_nodes(NODES)

    def go(play: Play) -> None:
        train(settings, name="run", storage=str(tmp_path), cluster=cluster, progress=play)

    play = Play(Cell(cluster, TARGETS[target]).stages(fault))
    if fault == "controller_lost":
        with pytest.raises(RunError):
            go(play)
        # Nobody but the driver frees the places of the group.
        await_free_nodes(NODES)
        go(Play([Stage(3, interrupt)]))
    else:
        go(play)

    folder = RunFolder(tmp_path / "run")
    result = folder.result()
    assert result is not None
    assert result["status"] == "interrupted"
    assert audit_run(folder).problems == ()
    steps = [row["step"] for row in folder.metrics() if "loss" in row]
    assert steps == list(range(1, result["steps"] + 1))
    events = folder.events()
    redone = {row["kind"]: row["steps_redone"] for row in events if row["kind"] == "resize"}
    assert set(redone.values()) <= {0}
    if fault == "drain_long":
        assert result["steps_redone"] == 0
    if fault == "hang":
        found = next(row["time"] for row in events if row["kind"] == "failure")
        print(f"the hung worker was found after {found - play.acted_at[0]:.1f} s")
