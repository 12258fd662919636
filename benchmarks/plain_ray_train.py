"""Ray Train as shipped, to compare with: two nodes of this machine and an elastic trainer over them.

The training functions are the benchmarks' own. Each stands there whole, as a person would write it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from elastic_kfac.cluster.ray import local_cluster
from elastic_kfac.cluster.ray.connection import quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster

_THREADS = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@contextlib.contextmanager
def two_nodes() -> Iterator[LocalCluster]:
    """A connected cluster that detects failures by Ray's default settings."""
    with (
        patch.object(local_cluster, "_DETECTION", {}),
        patch.object(local_cluster, "_WORKER_ENVIRONMENT", _THREADS),
        patch.object(local_cluster, "_PRELOADED", ()),
        quiet_driver(),
        LocalCluster(2) as cluster,
    ):
        cluster.connect()
        yield cluster


def elastic_trainer(
    train_function: Callable[[Mapping[str, Any]], None],
    options: Mapping[str, Any],
    storage: Path,
    *,
    callbacks: Sequence[Any] = (),
) -> TorchTrainer:
    """A trainer of one or two workers that restarts after every failure."""
    return TorchTrainer(
        train_function,
        train_loop_config=dict(options),
        scaling_config=ScalingConfig(num_workers=(1, 2), elastic_resize_monitor_interval_s=5),
        run_config=RunConfig(
            name="plain",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=-1),
            callbacks=list(callbacks) or None,
        ),
    )
