"""Elastic training under Ray Train, as the driver sees it: start, watch, follow, end."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic_kfac.cluster.ray.connection import StopSignals, connected, environment, quiet_driver
from elastic_kfac.cluster.ray.controller import (
    ElasticCallback,
    InPlaceCallback,
    OwnGroupBackend,
    ReplicaBackend,
)
from elastic_kfac.cluster.ray.idle_workers import prestart_workers, train_environment
from elastic_kfac.cluster.ray.local_cluster import LocalCluster, cluster_for
from elastic_kfac.cluster.ray.nodes import alive_worker_nodes, room_for_workers
from elastic_kfac.cluster.ray.scaling import refresh_capacity, request_of
from elastic_kfac.cluster.run.faults import FaultPlan
from elastic_kfac.cluster.run.in_place_recorder import InPlaceRecorder
from elastic_kfac.cluster.run.listener import RecorderListener
from elastic_kfac.cluster.run.membership_host import create_membership_host
from elastic_kfac.cluster.run.progress import Display, ProgressLine, workers
from elastic_kfac.cluster.run.recorder import RunRecorder, RunView
from elastic_kfac.cluster.run.result import RunResult, build_result
from elastic_kfac.cluster.run.telemetry import TelemetryOptions
from elastic_kfac.cluster.run.vault import VaultKeeper, head_node
from elastic_kfac.cluster.run.worker import RANK_FUNCTION, WorkerSettings, run_worker
from elastic_kfac.config import Config
from elastic_kfac.errors import ElasticKfacError, RunError
from elastic_kfac.observability.run_log import (
    VARIABLE,
    LogContext,
    begin_log,
    levels_of_this_process,
)
from elastic_kfac.state.run_folder import RunFolder

STOP_TIMEOUT_S = 60.0
"""How long a stop signal waits for the ranks to save their state."""

RAY_FOLDER = ".ray"
"""Folder of a run where Ray Train keeps its own files while the run goes on."""
REQUEST_FILE = f"{RAY_FOLDER}/request"
"""Under which name the run asks Ray for nodes."""

_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A worker that hangs is found within 30 s, the time of two polls included.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20",
    # Draining nodes are left out of the plan; Ray's own way would wait for the deadline.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Relative paths of a configuration are meant from where the command was given.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

# Nobody scrapes the embedded cluster: one process fewer per group.
_EMBEDDED_TRAIN_ENVIRONMENT = {"RAY_TRAIN_METRICS_ENABLED": "0"}


def train(
    config: Config,
    *,
    name: str,
    storage: str = "./runs",
    address: str | None = None,
    resize_at: Sequence[tuple[int, int]] = (),
    kill_at: Sequence[tuple[int, int]] = (),
    progress: Display | None = None,
    cluster: LocalCluster | None = None,
    rank_function: str = RANK_FUNCTION,
    stop_signals: StopSignals | None = None,
    share: Callable[[], int] | None = None,
    logical_gpus: bool = False,
) -> RunResult:
    """Trains until the configured end; the same `name` continues where an earlier call ended.

    Args:
        config: The run.
        name: Name of the run; its folder is `<storage>/<name>`.
        storage: Folder or URI that every node of the cluster reaches.
        address: Address of a Ray cluster; None starts one on this machine with a node per worker
            of `elastic.max_workers`.
        resize_at: `(step, nodes)`: when the step is committed, embedded nodes go or come until
            there are `nodes`.
        kill_at: `(step, rank)`: when the step is committed, that rank's process is killed.
        progress: Where the run is shown; None is a live line on standard output.
        cluster: An embedded cluster to use and to leave running; this process is connected to it.
        rank_function: `module:function` that runs one rank.
        stop_signals: Where the wish to stop comes from; None is Ctrl-C and SIGTERM.
        share: How many workers this run may use now, called in Ray Train's controller; None leaves
            that to Ray.
        logical_gpus: Whether the GPUs of a given `cluster` are only Ray's numbers, so that ranks
            compute on the CPU although `resources.use_gpu` is set.

    Returns:
        How the run ended, also when it was stopped by a signal.

    Raises:
        UsageError: If the run could not work as configured (also when a worker found out).
        RunError: If the run failed; the cause is in its one line.
    """
    if levels_of_this_process():
        begin_log(LogContext(name), os.environ[VARIABLE])
    display = progress or ProgressLine()
    folder = RunFolder(f"{storage.rstrip('/')}/{name}")
    with contextlib.ExitStack() as stack:
        stack.callback(display.close)
        signals = stack.enter_context(stop_signals or StopSignals())
        stack.enter_context(quiet_driver())
        if cluster is None and address is None:
            display.say(f"Starting a local Ray cluster with {config.elastic.max_workers} nodes …")
            cluster = stack.enter_context(cluster_for(config, config.elastic.max_workers))
            cluster.connect()
        elif address is not None:
            stack.enter_context(connected(address))
        faults = FaultPlan(cluster, resize_at, kill_at)
        if folder.storage.exists("checkpoints"):
            display.say(f"Run {name} exists in {storage}: continuing it.")
        folder.write_config(config)
        signals.defer()
        run = _Run(
            config,
            folder,
            cluster,
            faults,
            display,
            signals,
            rank_function,
            share,
            logical_gpus,
        )
        return run.finish()


class _Run:
    """One call of `train`, connected to a cluster."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        cluster: LocalCluster | None,
        faults: FaultPlan,
        display: Display,
        signals: StopSignals,
        rank_function: str,
        share: Callable[[], int] | None,
        logical_gpus: bool,
    ) -> None:
        self._config = config
        self._folder = folder
        self._faults = faults
        self._display = display
        self._signals = signals
        self._seen_events = 0
        self._nodes: set[str] = set(alive_worker_nodes())
        self._nodes_checked = time.monotonic()
        self._waiting_since = time.monotonic()
        run_uri = folder.storage.path() if folder.storage.is_local else folder.uri
        telemetry = TelemetryOptions(
            run_uri.rpartition("/")[2],
            config.elastic.min_workers,
            config.elastic.max_workers,
            exports=cluster is None or os.environ.get("RAY_TRAIN_METRICS_ENABLED") == "1",
            log=levels_of_this_process(),
        )
        in_place = config.elastic.in_place
        self._recorder: Any = (
            ray.remote(InPlaceRecorder if in_place else RunRecorder)
            .options(
                num_cpus=0,
                max_concurrency=1000,
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    ray.get_runtime_context().get_node_id(), soft=False
                ),
            )
            .remote(run_uri, telemetry=telemetry)
        )
        home = head_node() or ray.get_runtime_context().get_node_id()
        self._vaults = VaultKeeper(home)
        ray.get(self._recorder.set_vaults.remote(self._vaults.places))
        # Only our own nodes preload what a rank imports; elsewhere an idle process saves little.
        self._spares = 1 if cluster is not None else 0
        settings = WorkerSettings(
            config,
            run_uri,
            self._recorder,
            rank_function,
            telemetry=telemetry,
            membership_host=create_membership_host(home) if in_place else None,
            logical_gpus=logical_gpus,
        )
        scratch = f"{run_uri}/{RAY_FOLDER}" if cluster is None else str(cluster.log_folder.parent)
        elastic = config.elastic
        listener = RecorderListener(self._recorder)
        grows = elastic.batch_policy == "abs" and config.batch.policy != "constant"
        options: dict[str, Any] = {
            "spare_processes": self._spares,
            "wanted": listener.wanted_workers if grows else None,
            "share": share,
        }
        self._trainer = TorchTrainer(
            run_worker,
            train_loop_config=settings,
            torch_config=ReplicaBackend() if in_place else OwnGroupBackend(),
            scaling_config=ScalingConfig(
                num_workers=(elastic.min_workers, elastic.max_workers),
                elastic_resize_monitor_interval_s=elastic.resize_poll_s,
                use_gpu=config.resources.use_gpu,
                resources_per_worker=dict(config.resources.per_worker),
            ),
            run_config=RunConfig(
                name=run_uri.rpartition("/")[2],
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=-1),
                callbacks=[
                    InPlaceCallback(
                        listener,
                        wait_s=elastic.in_place_wait_s,
                        min_workers=elastic.min_workers,
                        **options,
                    )
                    if in_place
                    else ElasticCallback(listener, **options)
                ],
            ),
        )
        self._environment = {
            **_TRAIN_ENVIRONMENT,
            **(_EMBEDDED_TRAIN_ENVIRONMENT if cluster is not None else {}),
        }
        self._fit_error: BaseException | None = None

    def finish(self) -> RunResult:
        """Fits, watches, and turns the end into a result or an error."""
        request = request_of(self._trainer)
        storage = self._folder.storage
        if storage.exists(REQUEST_FILE):
            # The driver before this one was killed, and its controller with it.
            refresh_capacity(withdraw=[storage.read(REQUEST_FILE).decode()])
        storage.write(REQUEST_FILE, request.encode())
        with environment(self._environment, user_wins=True):
            if self._spares:
                # The controller and its helpers on this node, the first group on the others.
                inherited = train_environment()
                prestart_workers(self._nodes, 1, environment=inherited)
                here = ray.get_runtime_context().get_node_id()
                prestart_workers({here}, 3, environment=inherited)
            fit = threading.Thread(target=self._fit, name="ray-train", daemon=True)
            fit.start()
            try:
                self._watch(fit)
            finally:
                self._vaults.close()
        view: RunView = ray.get(self._recorder.close.remote())
        storage.delete(RAY_FOLDER)
        self._display.update(self._unseen(view))
        if self._fit_error is not None:
            # A controller that was killed has freed nothing.
            refresh_capacity(withdraw=[request])
            if view.placement_group is not None:
                remove_placement_group(view.placement_group)
        if (view.outcome or {}).get("status") == "finished":
            self._fit_error = None
        result = build_result(
            self._folder,
            view,
            interrupted=self._signals.reason,
            unfired=[str(fault) for fault in self._faults.pending],
            target_accuracy=self._config.train.target_accuracy,
            failed=self._fit_error is not None,
        )
        self._display.close()
        if self._signals.reason is None and self._fit_error is not None:
            raise self._error(view)
        return result

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._fit_error = error

    def _watch(self, fit: threading.Thread) -> None:
        reached: Any = None
        stop_asked_at: float | None = None
        while fit.is_alive():
            view: RunView = ray.get(self._recorder.view.remote(self._seen_events))
            self._display.update(self._unseen(view))
            step = int(view.progress.get("step", -1))
            grown = self._faults.fire_due(step, view.pids, self._tell)
            self._follow_nodes(view, at_once=grown)
            self._say_what_is_missing(view)
            if self._signals.reason is not None:
                now = time.monotonic()
                if stop_asked_at is None:
                    stop_asked_at = now
                    self._display.say(f"{self._signals.reason}: saving the state and stopping …")
                    ray.get(self._recorder.stop.remote(self._signals.reason))
                # Without a group there is nobody to park, and the last state is safe already.
                patience = STOP_TIMEOUT_S if view.world_size else 3.0
                if now - stop_asked_at > patience and view.controller is not None:
                    # Killing it would leave a group that still waits for its places.
                    view.controller.abort.remote()
            next_step = self._faults.next_step
            if next_step is not None and next_step > step:
                # The recorder answers at the step itself; polling would come some steps late.
                reached = reached or self._recorder.reached.remote(next_step)
                if ray.wait([reached], timeout=0.2)[0]:
                    reached = None
            else:
                fit.join(0.2)

    def _follow_nodes(self, view: RunView, *, at_once: bool, interval_s: float = 1.0) -> None:
        if not at_once and time.monotonic() - self._nodes_checked < interval_s:
            return
        self._nodes_checked = time.monotonic()
        nodes = set(alive_worker_nodes())
        if nodes - self._nodes:
            # Ray Train looks at the nodes every 20 s only.
            refresh_capacity()
            if self._spares:
                prestart_workers(nodes - self._nodes, self._spares, environment=train_environment())
        self._nodes = nodes
        if view.phase == "running" and self._vaults.follow(view.rank_nodes, nodes):
            self._recorder.set_vaults.remote(self._vaults.places)

    def _say_what_is_missing(self, view: RunView, interval_s: float = 20.0) -> None:
        now = time.monotonic()
        if view.phase not in ("waiting", "starting") or view.world_size:
            self._waiting_since = now
        elif now - self._waiting_since >= interval_s:
            self._waiting_since = now
            need = self._config.elastic.min_workers
            room = room_for_workers(self._config.resources.of_a_worker())
            self._display.say(
                f"Waiting: the cluster has room for {workers(room)}, the run needs {need}."
                if room < need
                else f"Waiting: Ray is placing a group ({workers(room)} would fit)."
            )

    def _unseen(self, view: RunView) -> RunView:
        start = max(0, self._seen_events - (view.num_events - len(view.events)))
        self._seen_events = view.num_events
        return replace(view, events=view.events[start:])

    def _tell(self, row: Mapping[str, Any]) -> None:
        ray.get(self._recorder.add_event.remote(row))

    def _error(self, view: RunView) -> ElasticKfacError:
        if view.error is None:
            text = str(self._fit_error).strip().splitlines()
            return RunError(
                f"Ray Train ended the run: {type(self._fit_error).__name__}",
                given=text[0] if text else None,
                change=f"see {self._folder.uri}/events.jsonl",
            )
        if isinstance(view.error.exception, ElasticKfacError):
            if view.error.exit_code == 1 and view.error.traceback:
                self._display.say(view.error.traceback.rstrip())
            return view.error.exception
        if view.error.traceback:
            self._display.say(view.error.traceback.rstrip())
        rank = f" (rank {view.error.rank})" if view.error.rank >= 0 else ""
        return RunError(
            f"the run failed{rank}: {view.error.line}",
            change="it failed the same way each time it was tried; the last state is kept",
        )
