"""Survivors that keep process and state while Ray Train replaces a lost rank, on real nodes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.cluster.run.result import RunResult
from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.state.run_folder import RunFolder


def test_run_in_place_survivors_step_on_and_take_the_replacement_in(
    run: Callable[..., RunResult],
    config: Callable[[int], Config],
    cluster: LocalCluster,
    tmp_path: Path,
) -> None:
    changes = [("elastic.in_place", True), ("elastic.in_place_wait_s", 600)]
    display = _KillOneAfterTheOther(cluster)
    result = run(
        parse_config(apply_overrides(config(5000).model_dump(), changes)),
        tmp_path / "run",
        progress=display,
    )

    assert result.status == "interrupted"
    assert result.values["world_sizes"] == [2, 1, 2, 1, 2]
    folder = RunFolder(tmp_path / "run")
    events = folder.events()
    changes_of_world = [row for row in events if row["kind"] in ("recovery", "resize")]
    assert [row["kind"] for row in changes_of_world] == ["recovery", "resize"] * 2
    assert all(row["in_place"] for row in changes_of_world)
    # Whoever joins receives the state of that boundary; nothing is computed again for it.
    assert [row["steps_redone"] for row in changes_of_world][1::2] == [0, 0]
    grown = changes_of_world[1::2]
    assert [(row["way"], row["moved_bytes"] > 0) for row in grown] == [("resize", True)] * 2
    assert not [row for row in events if row["kind"] == "fallback"]
    # The survivor of the first loss, rank 0, was the process that was killed second.
    assert display.pids[0][0] == display.pids[1][0]
    assert display.pids[0][1] != display.pids[1][1]
    assert display.pids[1][1] == display.pids[2][1]
    steps = [row["step"] for row in folder.metrics() if "loss" in row]
    assert steps == list(range(1, result.values["steps"] + 1))
    assert audit_run(folder).problems == ()


class _KillOneAfterTheOther(Display):
    """Kills rank 1, then rank 0, each once the world is whole; then presses Ctrl-C."""

    def __init__(self, cluster: LocalCluster, steps: int = 30) -> None:
        self._cluster = cluster
        self._steps = steps
        self._since: dict[int, int] = {}
        self.pids: list[dict[int, int]] = []
        """Process of every rank, whenever the world was whole."""

    def update(self, view: RunView) -> None:
        changes = len(view.world_sizes)
        # Odd numbers of worlds: 2, 2-1-2 and 2-1-2-1-2.
        if changes % 2 == 0 or changes != 2 * len(self.pids) + 1:
            return
        step = int(view.progress.get("step", 0))
        if step < self._since.setdefault(changes, step) + self._steps:
            return
        self.pids.append(dict(view.pids))
        if changes == 5:
            # From another thread, so that the main thread meets it wherever it happens to be.
            threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            self._cluster.kill_worker(view.pids[1 if changes == 1 else 0])
