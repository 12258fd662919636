"""Nodes of the embedded cluster: they come, are lost at once, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from elastic_kfac.cluster.ray.local_cluster import LocalCluster, remove_abandoned_folders
from elastic_kfac.cluster.ray.nodes import (
    alive_worker_nodes,
    await_lost_nodes,
    draining_nodes,
    examine_cluster,
)
from elastic_kfac.errors import UsageError
from support.preemption import drain_node

NODES = 2
"""Beside the head."""

# As in a container without /dev/shm.
ABANDONED = """
import sys, time
import numpy, ray
from pathlib import Path
from elastic_kfac.cluster.ray import local_cluster
from elastic_kfac.cluster.ray.nodes import examine_cluster
from elastic_kfac.cluster.ray.local_cluster import LocalCluster, remove_abandoned_folders
local_cluster.SHARED_MEMORY = Path("/nowhere")
cluster = LocalCluster(1)
cluster.connect()
assert ray.get(ray.put(numpy.ones(1 << 20))).sum() == 1 << 20
print(cluster.log_folder, flush=True)
time.sleep(600)
"""

ENDED = """
import os
from pathlib import Path
from elastic_kfac.cluster.ray.local_cluster import LocalCluster, _descendants

def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

with LocalCluster(2) as cluster:
    names = {path.name for path in cluster.log_folder.parents[2].glob("raylet.*")}
    assert names == {"raylet.1", "raylet.2"}, names
    _, *started = _descendants([os.getpid()])
    # The GCS, the process of the dashboard, and three raylets with two agents each.
    assert len(started) >= 11, started
print(sum(map(alive, started)))
"""


def _until(condition: Callable[[], bool], seconds: float = 180.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _processes_with(text: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in command and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def test_node_removed_is_lost_for_ray_and_a_new_one_takes_its_place(
    cluster: LocalCluster,
) -> None:
    last = cluster.nodes[-1]
    lost = cluster.node_id(last)
    cluster.remove_node(last)

    assert await_lost_nodes({lost, cluster.node_id(cluster.nodes[0])}) == [lost]
    assert lost not in alive_worker_nodes()
    added = cluster.add_node()
    assert added not in (last, *cluster.nodes[:-1])
    assert _until(lambda: set(alive_worker_nodes()) == {cluster.node_id(i) for i in cluster.nodes})


def test_node_drained_is_alive_but_not_counted_on(cluster: LocalCluster) -> None:
    class Work:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    # A node with nothing on it would leave at once.
    work: Any = [ray.remote(num_cpus=1, max_restarts=0)(Work).remote() for _ in cluster.nodes]
    busy = set(ray.get([actor.node.remote() for actor in work]))
    last = cluster.nodes[-1]
    drained = cluster.node_id(last)
    assert drained in busy
    drain_node(cluster, last, deadline_s=600)
    assert _until(lambda: drained in draining_nodes())
    assert drained not in alive_worker_nodes()
    assert drained in {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    cluster.remove_node(last)
    assert await_lost_nodes({drained}) == [drained]
    assert not draining_nodes()


def test_examination_asks_every_node_for_its_clock(cluster: LocalCluster) -> None:
    facts = examine_cluster(cluster.address)
    assert (facts.nodes, facts.cpus, facts.silent) == (1 + NODES, NODES, ())
    assert len(facts.clock_skews_s) == 1 + NODES
    assert all(abs(skew) < 60 for skew in facts.clock_skews_s.values())


def test_worker_kill_takes_the_process_and_leaves_the_node(cluster: LocalCluster) -> None:
    class Victim:
        def pid(self) -> int:
            return os.getpid()

    victim: Any = ray.remote(num_cpus=1, max_restarts=0)(Victim).remote()
    cluster.kill_worker(ray.get(victim.pid.remote()))

    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(victim.pid.remote())
    assert len(alive_worker_nodes()) == len(cluster.nodes)


def test_worker_kill_refuses_a_process_of_somebody_else(cluster: LocalCluster) -> None:
    with pytest.raises(UsageError, match="not a worker process of this cluster"):
        cluster.kill_worker(os.getpid())


def test_folder_of_a_running_cluster_is_not_abandoned(cluster: LocalCluster) -> None:
    folder = cluster.log_folder.parents[2]
    assert folder not in remove_abandoned_folders(folder.parent)
    assert folder.exists()


def test_cluster_that_ends_leaves_no_agent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


def test_cluster_whose_driver_is_killed_leaves_no_process() -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", ABANDONED],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert driver.stdout is not None
        logs = Path(driver.stdout.readline().strip())
        folder = str(logs.parents[2])
        assert len(_processes_with(folder)) >= 3
        assert (Path(folder) / "objects").is_dir()
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    assert _until(lambda: _processes_with(folder) == [])
    assert Path(folder).exists()
    assert Path(folder) in remove_abandoned_folders(Path(folder).parent)
    assert not Path(folder).exists()
