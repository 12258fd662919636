"""The processes of one run: coordinator, replica actors, and Ray Train's controller with its workers."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util import remove_placement_group

from elastic_kfac.cluster.ray.connection import environment
from elastic_kfac.cluster.ray.controller import (
    ElasticCallback,
    LeanTrainer,
    OwnGroupBackend,
    StartCallback,
)
from elastic_kfac.cluster.ray.idle_workers import prestart_workers, train_environment
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.ray.nodes import alive_worker_nodes, head_node, start_actor
from elastic_kfac.cluster.ray.places import give_back
from elastic_kfac.cluster.ray.scaling import refresh_capacity, request_of
from elastic_kfac.cluster.run.coordinator import RunCoordinator, RunView
from elastic_kfac.cluster.run.replicas import ReplicaActors
from elastic_kfac.cluster.run.states import RunState
from elastic_kfac.cluster.run.supervisor import supervise
from elastic_kfac.cluster.run.worker import WorkerSettings, run_worker
from elastic_kfac.config import Config
from elastic_kfac.observability.telemetry import TelemetryOptions
from elastic_kfac.state.run_folder import RunFolder

RAY_FOLDER = ".ray"
"""Folder of a run where Ray Train keeps its own files while the run lasts."""
REQUEST_FILE = f"{RAY_FOLDER}/request"
"""Name under which the run requests nodes from Ray."""

_HANGS = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A worker that hangs is found within 30 s, the time of two polls included.
    _HANGS: "20",
    # Draining nodes are left out of the plan; Ray's own way would wait for the deadline.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Relative paths of a configuration are relative to where the command was given.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

# The embedded cluster is not scraped: one process fewer per group.
_EMBEDDED_TRAIN_ENVIRONMENT = {"RAY_TRAIN_METRICS_ENABLED": "0"}


_SUPERVISOR = ScalingConfig(num_workers=1, resources_per_worker={"node:__internal_head__": 0.001})
"""In place: beside the head, the most stable node there is, and without a CPU."""


def _workers(config: Config) -> ScalingConfig:
    elastic = config.elastic
    return ScalingConfig(
        num_workers=(elastic.min_workers, elastic.max_workers),
        elastic_resize_monitor_interval_s=elastic.resize_poll_s,
        use_gpu=config.resources.use_gpu,
        resources_per_worker=dict(config.resources.per_worker),
    )


def run_label(run_uri: str) -> str:
    """The value of the metrics' label `run`: trials of two searches have the same names."""
    *_, group, kind, name = ["", "", *run_uri.rstrip("/").split("/")]
    return f"{group}/{name}" if kind == "trials" else name


class Launch:
    """Starts a run on the connected cluster, keeps up with its nodes, and cleans up after it."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        cluster: LocalCluster | None,
        *,
        rank_function: str,
        member_function: str | None,
        restarts_because: str | None,
        share: Callable[[], int] | None,
        logical_gpus: bool,
        log: str,
        resumed: bool,
    ) -> None:
        """Creates the actors and Ray Train's trainer; `start` runs it.

        Args:
            rank_function: As in `trainer.train`, like `member_function`, `share` and `logical_gpus`.
            restarts_because: Why changes of the world restart all workers (`mode.why_restarts`).
            log: Levels of the log, in the syntax of `ELASTIC_KFAC_LOG`.
            resumed: Whether the run's folder stays as it is until its state is restored.
        """
        self._folder = folder
        self._nodes: set[str] = set(alive_worker_nodes())
        self._nodes_checked = time.monotonic()
        # Only our own nodes preload what a rank imports; elsewhere an idle process saves little.
        self._spares = 1 if cluster is not None else 0
        self._embedded = cluster is not None
        self.error: BaseException | None = None
        """Raised by Ray Train."""
        run_uri = folder.storage.path() if folder.storage.is_local else folder.uri
        elastic = config.elastic
        self._in_place = in_place = elastic.in_place and restarts_because is None
        self._places = f"elastic-kfac-{uuid.uuid4().hex[:12]}"
        telemetry = TelemetryOptions(
            run_label(run_uri),
            elastic.min_workers,
            elastic.max_workers,
            exports=cluster is None or os.environ.get("RAY_TRAIN_METRICS_ENABLED") == "1",
            log=log,
        )
        if self._spares:
            # For the controller and what it starts on this node: two helpers and a supervisor, with the
            # process that Ray starts for the controller in any case.
            here = ray.get_runtime_context().get_node_id()
            with self.environment():
                prestart_workers({here}, 2 + in_place, environment=train_environment())
        home = head_node()
        self.coordinator = start_actor(
            RunCoordinator,
            run_uri,
            in_place=in_place,
            telemetry=telemetry,
            config=config if resumed else None,
        )
        if restarts_because is not None:
            self.coordinator.restarts.remote(restarts_because)
        self._replicas = ReplicaActors(home or ray.get_runtime_context().get_node_id())
        self._coordinator_ready = self.coordinator.set_replica_places.remote(self._replicas.places)
        settings = WorkerSettings(
            config,
            run_uri,
            self.coordinator,
            rank_function,
            member_function if in_place else None,
            telemetry=telemetry,
            logical_gpus=logical_gpus,
            share=share,
            spare_processes=self._spares,
            places=self._places,
            hangs_after_s=float(os.environ.get(_HANGS, _TRAIN_ENVIRONMENT[_HANGS])),
        )
        scratch = f"{run_uri}/{RAY_FOLDER}" if cluster is None else str(cluster.log_folder.parent)
        self._trainer = LeanTrainer(
            supervise if in_place else run_worker,
            outlived=cluster is None,
            train_loop_config=settings,
            backend_config=OwnGroupBackend(),
            scaling_config=_SUPERVISOR if in_place else _workers(config),
            run_config=RunConfig(
                name=run_uri.rpartition("/")[2],
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[self._callback(config, share)],
            ),
        )
        self._request = request_of(self._trainer)

    def start(self) -> threading.Thread:
        """Starts Ray Train in a thread, which ends with the run."""
        storage = self._folder.storage
        if storage.exists(REQUEST_FILE):
            # The driver before this one was killed, and its controller with it.
            refresh_capacity(withdraw=[storage.read(REQUEST_FILE).decode()])
        storage.write(REQUEST_FILE, self._request.encode())
        fit = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        fit.start()
        # Not before: the controller can start beside it.
        ray.get(self._coordinator_ready)
        return fit

    def environment(self) -> Any:
        """A context manager with Ray Train's settings; the run takes place inside it."""
        embedded = _EMBEDDED_TRAIN_ENVIRONMENT if self._embedded else {}
        return environment({**_TRAIN_ENVIRONMENT, **embedded}, user_wins=True)

    def follow_nodes(self, view: RunView, *, at_once: bool, interval_s: float = 1.0) -> None:
        """Makes new nodes known to Ray Train or ready for members, and moves replicas to the ranks."""
        if not at_once and time.monotonic() - self._nodes_checked < interval_s:
            return
        self._nodes_checked = time.monotonic()
        nodes = set(alive_worker_nodes())
        if nodes - self._nodes:
            if not self._in_place:
                # Ray Train looks at the nodes every 20 s only.
                refresh_capacity()
            if self._spares:
                prestart_workers(nodes - self._nodes, self._spares, environment=train_environment())
        self._nodes = nodes
        if view.state is RunState.RUNNING and self._replicas.follow(view.rank_nodes, nodes):
            self.coordinator.set_replica_places.remote(self._replicas.places)

    def end_replicas(self) -> None:
        """Ends the replica actors."""
        self._replicas.close()

    def close(self) -> RunView:
        """Removes what Ray Train leaves behind; returns the last view of the run."""
        view: RunView = ray.get(self.coordinator.close.remote())
        self._folder.storage.delete(RAY_FOLDER)
        if self.error is not None:
            # A controller that was killed has freed nothing.
            refresh_capacity(withdraw=[self._request])
            if view.placement_group is not None:
                remove_placement_group(view.placement_group)
        if self._in_place:
            # A supervisor that was killed has freed nothing either.
            give_back(self._places)
        if (view.outcome or {}).get("status") == "finished":
            self.error = None
        elif view.error is not None and self.error is None:
            self.error = RuntimeError(view.error.line)
        return view

    def _callback(self, config: Config, share: Callable[[], int] | None) -> StartCallback:
        elastic = config.elastic
        if self._in_place:
            return StartCallback(self.coordinator, spare_processes=self._spares)
        return ElasticCallback(
            self.coordinator,
            spare_processes=self._spares,
            requests_wanted_workers=elastic.batch_policy == "abs"
            and config.batch.policy != "constant",
            share=share,
        )

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error
