"""Elastic training under Ray Train, from the driver: start, watch, show, end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from elastic_kfac.cluster.ray.connection import connected, quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster, cluster_for, start_line
from elastic_kfac.cluster.ray.nodes import room_for_workers
from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.faults import FaultPlan
from elastic_kfac.cluster.run.mode import MEMBER_FUNCTION, RANK_FUNCTION, why_restarts
from elastic_kfac.cluster.run.progress import Display, ProgressLine, workers
from elastic_kfac.cluster.run.result import RunResult, build_result, error_of, resumes
from elastic_kfac.cluster.run.states import RunState
from elastic_kfac.config import Config
from elastic_kfac.errors import ElasticKfacError, RunError
from elastic_kfac.observability.run_log import LogContext, begin_log, levels_of_this_process
from elastic_kfac.runs.signals import StopSignals
from elastic_kfac.state.run_folder import RunFolder

if TYPE_CHECKING:
    from elastic_kfac.cluster.run.launch import Launch

STOP_TIMEOUT_S = 60.0
"""How long a stop signal waits for the ranks to save their state."""


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
    member_function: str | None = None,
    stop_signals: StopSignals | None = None,
    share: Callable[[], int] | None = None,
    logical_gpus: bool = False,
    wait_s: float = 0.0,
) -> RunResult:
    """Trains until the configured end; the same `name` continues where an earlier call ended.

    Args:
        name: Name of the run; its folder is `<storage>/<name>`.
        storage: Folder or URI that every node of the cluster reaches.
        address: Address of a Ray cluster; None starts one on this machine with a node per worker
            of `elastic.max_workers`.
        resize_at: `(step, nodes)`: once the step is committed, embedded nodes are removed or added
            until there are `nodes`.
        kill_at: `(step, rank)`: once the step is committed, that rank's process is killed.
        progress: Shows the run; None is a live line on standard output.
        cluster: An embedded cluster to use and to leave running; this process is connected to it.
        rank_function: `module:function` that runs one rank (`training.loop.run_rank`).
        member_function: `module:function` that runs one rank in place (`training.in_place.run_member`);
            None with a `rank_function` of one's own means that changes of the world restart all workers.
        stop_signals: Source of stop requests; None is Ctrl-C, SIGTERM and SIGHUP.
        share: How many workers this run may use now, called in Ray Train's controller; None leaves
            that to Ray.
        logical_gpus: Whether the GPUs of a given `cluster` are only Ray's numbers, so that ranks
            compute on the CPU although `resources.use_gpu` is set.
        wait_s: How long to wait for another process that still writes the run's folder.

    Returns:
        How the run ended, also when it was stopped by a signal.

    Raises:
        UsageError: If the run cannot work as configured, also when a worker raises it, or another
            process writes its folder.
        RunError: If the run failed, with the cause.
    """
    if rank_function == RANK_FUNCTION:
        member_function = member_function or MEMBER_FUNCTION
    levels = levels_of_this_process()
    if levels:
        begin_log(LogContext(name), levels)
    display = progress or ProgressLine()
    folder = RunFolder(f"{storage.rstrip('/')}/{name}")
    with contextlib.ExitStack() as stack:
        stack.callback(display.close)
        signals = stack.enter_context(stop_signals or StopSignals())
        stack.enter_context(folder.claimed(f"run {name}", display.say, wait_s=wait_s))
        resumed = resumes(folder, config, name, display)
        stack.enter_context(quiet_driver())
        if cluster is None and address is None:
            display.say(start_line(config.elastic.max_workers))
            cluster = stack.enter_context(cluster_for(config, config.elastic.max_workers))
            cluster.connect()
        elif address is not None:
            stack.enter_context(connected(address))
        # It imports Ray Train, which a cluster of this process has imported while its nodes started.
        from elastic_kfac.cluster.run.launch import Launch

        faults = FaultPlan(cluster, resize_at, kill_at)
        if not resumed:
            folder.write_config(config)
        signals.defer()
        launch = Launch(
            config,
            folder,
            cluster,
            rank_function=rank_function,
            member_function=member_function,
            restarts_because=why_restarts(config, member_function, logical_gpus=logical_gpus),
            share=share,
            logical_gpus=logical_gpus,
            log=levels,
            resumed=resumed,
        )
        return _Driver(config, folder, launch, faults, display, signals).finish()


class _Driver:
    """One call of `train`, connected to a cluster."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        launch: Launch,
        faults: FaultPlan,
        display: Display,
        signals: StopSignals,
    ) -> None:
        self._config = config
        self._folder = folder
        self._launch = launch
        self._faults = faults
        self._display = display
        self._signals = signals
        self._seen_events = 0
        self._waiting_since = time.monotonic()

    def finish(self) -> RunResult:
        """Runs to the end and turns it into a result or an error."""
        with self._launch.environment():
            try:
                self._watch(self._launch.start())
            finally:
                self._launch.end_replicas()
        view = self._launch.close()
        self._display.update(self._unseen(view))
        failure = self._launch.error
        result = build_result(
            self._folder,
            view,
            interrupted=self._signals.reason,
            unfired=[str(fault) for fault in self._faults.pending],
            goal=self._config.train.goal,
            failed=failure is not None,
        )
        self._display.close()
        if failure is not None and (self._signals.reason is None or not view.is_accepted):
            raise self._error(view, failure, result.safe)
        return result

    def _watch(self, fit: threading.Thread) -> None:
        coordinator = self._launch.coordinator
        reached: Any = None
        stop_requested_at: float | None = None
        while fit.is_alive():
            self._folder.check_claim()
            view: RunView = ray.get(coordinator.view.remote(self._seen_events))
            self._display.update(self._unseen(view))
            step = int(view.progress.get("step", -1))
            grown = self._faults.fire_due(step, view.pids, self._record_event)
            self._launch.follow_nodes(view, at_once=grown)
            self._report_missing_capacity(view)
            if self._signals.reason is not None:
                now = time.monotonic()
                if stop_requested_at is None:
                    stop_requested_at = now
                    self._display.say(f"{self._signals.reason}: saving the state and stopping …")
                    ray.get(coordinator.stop.remote(self._signals.reason))
                # Without a group there is nothing to drain, and the last state is safe already.
                patience = STOP_TIMEOUT_S if view.world_size else 3.0
                if now - stop_requested_at > patience and view.controller:
                    # Killing it would leave a group that still waits for its places.
                    with contextlib.suppress(ray.exceptions.RayError):
                        ray.get(view.controller[0], timeout=5.0).abort.remote()
            next_step = self._faults.next_step
            if next_step is not None and next_step > step:
                # The coordinator answers at the step itself; polling would come some steps late.
                reached = reached or coordinator.reached.remote(next_step)
                if ray.wait([reached], timeout=0.2)[0]:
                    reached = None
            else:
                fit.join(0.2)

    def _report_missing_capacity(self, view: RunView, interval_s: float = 20.0) -> None:
        now = time.monotonic()
        if view.state not in (RunState.WAITING, RunState.STARTING) or view.world_size:
            self._waiting_since = now
        elif now - self._waiting_since >= interval_s:
            self._waiting_since = now
            need = self._config.elastic.min_workers
            room = room_for_workers(self._config.resources.of_a_worker())
            self._display.say(
                f"Waiting: the cluster has room for {workers(room)}, the run needs {need}."
                if room < need
                else f"Waiting: Ray is placing a group (capacity: {workers(room)})."
            )

    def _unseen(self, view: RunView) -> RunView:
        start = max(0, self._seen_events - (view.num_events - len(view.events)))
        self._seen_events = view.num_events
        return replace(view, events=view.events[start:])

    def _record_event(self, row: Mapping[str, Any]) -> None:
        ray.get(self._launch.coordinator.add_event.remote(row))

    def _error(self, view: RunView, failure: BaseException, safe: str) -> ElasticKfacError:
        if view.error is None:
            text = str(failure).strip().splitlines()
            return RunError(
                f"Ray Train ended the run: {type(failure).__name__}",
                given=text[0] if text else None,
                change=f"see {self._folder.uri}/events.jsonl; {safe}",
            )
        change = f"it failed in the same way at every attempt; {safe}"
        return error_of(view.error, self._display, change=change)
