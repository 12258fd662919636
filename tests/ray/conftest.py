"""One embedded cluster for all tests of this folder, and a small digits run to put on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from elastic_kfac.cli.entry import main
from elastic_kfac.cluster.ray.connection import quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.ray.nodes import await_lost_nodes, staying_nodes
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.cluster.run.result import RunResult
from elastic_kfac.cluster.run.trainer import train
from elastic_kfac.config import Config, parse_config

NODES = 2

PATIENCE_S = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": 240,
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": 120,
}
"""A slow machine is no fault: a start or an answer that takes long must not begin another attempt."""

TIMEOUT_S = 600
"""Of a test; the waits inside are shorter."""

RAY_DEPRECATES_ITSELF = (
    r"ignore::DeprecationWarning:ray\..*",
    r"ignore::FutureWarning:ray\..*",
)
"""Ray 2.60 calls deprecated parts of itself; everything else stays an error."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for rule in RAY_DEPRECATES_ITSELF:
                item.add_marker(pytest.mark.filterwarnings(rule))
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[LocalCluster]:
    """The cluster of the session; `cluster` and `run` put its nodes in order first."""
    with pytest.MonkeyPatch.context() as patch:
        # Ranks import `failing_ranks` by name.
        here = str(Path(__file__).parent)
        paths = [path for path in (os.environ.get("PYTHONPATH"), here) if path]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        for name, seconds in PATIENCE_S.items():
            patch.setenv(name, str(seconds))
        with quiet_driver(), LocalCluster(NODES) as cluster:
            cluster.connect()
            yield cluster


@pytest.fixture
def cluster(session_cluster: LocalCluster) -> LocalCluster:
    """A cluster with two worker nodes."""
    return in_order(session_cluster)


def in_order(cluster: LocalCluster) -> LocalCluster:
    """Gives a cluster its two worker nodes back; a drained one takes no work, and goes."""
    there = staying_nodes()
    staying = [index for index in cluster.nodes if cluster.node_id(index) in there][:NODES]
    superfluous = [index for index in cluster.nodes if index not in staying]
    removed = {cluster.node_id(index) for index in superfluous}
    for index in superfluous:
        cluster.remove_node(index)
    # Until they are known to be dead Ray would place something on them.
    await_lost_nodes(removed)
    while len(cluster.nodes) < NODES:
        cluster.add_node()
    return cluster


@pytest.fixture(scope="session")
def await_free_nodes() -> Callable[[int], None]:
    """Waits until so many nodes have nothing to do, the ones of the run before included."""

    def wait(count: int) -> None:
        deadline = time.monotonic() + 180
        while ray.available_resources().get("CPU", 0) < count:
            assert time.monotonic() < deadline, "the nodes of the run before are still in use"
            time.sleep(0.1)

    return wait


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scikit-learn's digits."""
    root = tmp_path_factory.mktemp("data") / "digits"
    assert main(["shards", "make", "--source", "digits", "--out", str(root)]) == 0
    return root


@pytest.fixture(scope="session")
def config(digits: Path) -> Callable[[int], Config]:
    """Makes the configuration of a run of so many epochs (45 steps each)."""

    def make(epochs: int) -> Config:
        return parse_config(
            {
                "data": {"shards": str(digits)},
                "train": {"epochs": epochs, "global_batch_size": 32, "eval_every_epochs": 4},
                "optimizer": {"lr": 0.02},
                "kfac": {"damping": 1e-2, "kl_clip": 1e-4, "inverse_update_steps": 20},
                "elastic": {"max_workers": NODES, "snapshot_interval_s": 0.25},
            }
        )

    return make


@pytest.fixture(scope="session")
def run(
    session_cluster: LocalCluster, await_free_nodes: Callable[[int], None]
) -> Callable[..., RunResult]:
    """Trains on the session's cluster with two nodes at the start."""

    def start(config: Config, folder: Path, **options: Any) -> RunResult:
        options.setdefault("progress", Display())
        cluster = in_order(session_cluster)
        await_free_nodes(NODES)
        return train(
            config, name=folder.name, storage=str(folder.parent), cluster=cluster, **options
        )

    return start
