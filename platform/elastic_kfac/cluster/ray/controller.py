"""Callbacks in Ray Train's controller.

`StartCallback` registers the controller and keeps its settings from the workers. `ElasticCallback` also
drains a live group before Ray Train resizes it, and has the next group planned without the nodes that
were lost. `LeanTrainer` starts the controller with no other actors than a run needs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

from elastic_kfac.cluster.ray.idle_workers import await_idle_workers, prestart_workers
from elastic_kfac.cluster.ray.internals import (
    ENV_VARS_TO_PROPAGATE,
    ControllerCallback,
    DataParallelTrainer,
    DatasetsCallback,
    PlacementGroupCleanerCallback,
    WorkerGroupCallback,
)
from elastic_kfac.cluster.ray.nodes import (
    alive_worker_nodes,
    await_lost_nodes,
    draining_nodes,
    seconds_left,
)
from elastic_kfac.cluster.ray.scaling import (
    POLICY_CACHE_S,
    plan_with_staying_nodes,
    plan_within,
    refresh_capacity,
    request_wanted_workers,
)

DRAIN_TIMEOUT_S = 60.0
"""Limit for the ranks to save their state before a planned resize."""


class RunIsOver(Exception):
    """The ranks had finished when a resize was about to happen."""


class _NoGroup(Backend):
    """Leaves the process group to the training function."""


@dataclass
class OwnGroupBackend(BackendConfig):
    """The training function chooses its device, and creates and destroys the process group itself."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _NoGroup


class LeanTrainer(DataParallelTrainer):
    """Ray Train with as few processes and imports as a run needs.

    It is no `TorchTrainer`, with which the controller would import torch, and it starts no actor for
    datasets of Ray Data: ranks read shards themselves.
    """

    def __init__(self, *arguments: Any, outlived: bool, **options: Any) -> None:
        """As Ray's.

        Args:
            outlived: Whether the cluster goes on when the driver dies. Where it does not, the actor that
                would then free the group's places is left out, too.
        """
        self._needless = (
            (DatasetsCallback,) if outlived else (DatasetsCallback, PlacementGroupCleanerCallback)
        )
        super().__init__(*arguments, **options)

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, self._needless)]


class StartCallback(ControllerCallback, WorkerGroupCallback):
    """Registers the controller and gives workers an environment in which they find idle processes."""

    def __init__(self, coordinator: Any, *, spare_processes: int = 0) -> None:
        """Created by the driver, runs in Ray Train's controller.

        Args:
            spare_processes: Idle worker processes to keep ready on every node of a group.
        """
        self._coordinator = coordinator
        self._spares = spare_processes
        self._variables: dict[str, str] = {}

    def after_controller_start(self, train_run_context: Any) -> None:
        """Registers the controller, and has processes for the first ranks started."""
        if self._spares:
            # Not before: their imports would take the CPU from what the ranks wait for.
            prestart_workers(set(alive_worker_nodes()), self._spares)
        this = ray.get_runtime_context().current_actor
        # A reference in a list: to read the handle itself, its keeper would import Ray Train.
        self._coordinator.controller_started.remote([ray.put(this)])

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> None:
        """Restores the settings that a new group reads from the environment."""
        os.environ.update(self._variables)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Hides the settings from the workers: the group has read them already.

        Workers with a runtime environment of their own could not use idle processes.
        """
        found = [name for name in ENV_VARS_TO_PROPAGATE if name in os.environ]
        self._variables.update({name: os.environ.pop(name) for name in found})


class ElasticCallback(StartCallback):
    """Drains the ranks before a planned resize and clears the way after a loss."""

    def __init__(
        self,
        coordinator: Any,
        *,
        spare_processes: int = 0,
        head_start_s: float = 15.0,
        requests_wanted_workers: bool = False,
        share: Callable[[], int] | None = None,
    ) -> None:
        """Created by the driver, runs in Ray Train's controller.

        Args:
            spare_processes: Idle worker processes to keep ready on every node of a group.
            head_start_s: Upper bound on the time that processes on new nodes get for their imports
                before the group drains; only with spare processes.
            requests_wanted_workers: Whether to request as many workers as the batch keeps busy; the
                maximum otherwise.
            share: How many workers this run may use; None leaves that to Ray.
        """
        super().__init__(coordinator, spare_processes=spare_processes)
        self._head_start_s = head_start_s
        self._requests_wanted_workers = requests_wanted_workers
        self._share = share
        self._nodes: dict[int, str] = {}
        self._pids: dict[int, int] = {}
        self._errors: dict[int, str] = {}
        self._actors: tuple[Any, ...] = ()
        self._training = False
        self._without_spares = False

    def after_controller_start(self, train_run_context: Any) -> None:
        """Also patches the controller's scaling policy."""
        plan_with_staying_nodes()
        if self._requests_wanted_workers:
            request_wanted_workers(lambda: ray.get(self._coordinator.wanted_workers.remote()))
        if self._share is not None:
            plan_within(self._share)
        # The coordinator outlives runs: its view may be older than this cluster's newest node.
        refresh_capacity()
        super().after_controller_start(train_run_context)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Also reports how large the next group will be."""
        super().before_worker_group_start(worker_group_context)
        self._coordinator.group_planned.remote(worker_group_context.num_workers)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Reports where the ranks run."""
        self._errors = {}
        self._locate_workers(worker_group)
        ray.get(self._coordinator.group_started.remote(self._pids, self._nodes))

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """From now on a resize has to drain the ranks first."""
        self._training = True
        self._without_spares = self._spares > 0

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Keeps errors: the failure hook does not receive them. Starts spares after the first step."""
        for rank, error in worker_group_status.errors.items():
            self._errors.setdefault(rank, f"{type(error).__name__}: {error}")
        # Not before: what spares import takes the CPU from ranks that start.
        if self._without_spares and ray.get(self._coordinator.has_stepped.remote()):
            self._without_spares = False
            self._prestart()

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Drains a live group; a group that is dead or was not started needs nothing."""
        if self._training:
            self._training = False
            self._warm_up_joiners()
            self._drain(resize_decision.num_workers)

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Makes sure that the next group is planned without the nodes that were lost."""
        # Ray may have heard of a survivor's error first: the rank that died is the cause.
        self._errors = {**(self._dead() if self._training else {}), **self._errors}
        self._training = False
        lost = await_lost_nodes(set(self._nodes.values()))
        _end_run_if(self._coordinator.group_failed.remote(dict(self._errors), lost))
        refresh_capacity()
        if lost:
            time.sleep(POLICY_CACHE_S)

    def _drain(self, new_world_size: int) -> None:
        leaving = draining_nodes()
        nodes = sorted({node for node in self._nodes.values() if node in leaving})
        reason = f"the cluster has room for {_count(new_world_size, 'worker')}"
        if nodes:
            names = ", ".join(node_id[:8] for node_id in nodes)
            reason = f"{_count(len(nodes), 'node')} being drained ({names}); {reason}"
        drained = self._coordinator.drain.remote(
            reason, timeout_s=DRAIN_TIMEOUT_S, notice_s=seconds_left(nodes)
        )
        while not ray.wait([drained], timeout=1.0)[0]:
            if self._dead():
                return
        if ray.get(drained):
            # The decision cannot be taken back; an exception ends the run without a new group.
            raise RunIsOver

    def _locate_workers(self, worker_group: Any) -> None:
        workers = worker_group.get_workers()
        self._actors = tuple(worker.actor for worker in workers)
        ranks = {worker.distributed_context.world_rank: worker.metadata for worker in workers}
        self._pids = {rank: process.pid for rank, process in ranks.items()}
        self._nodes = {rank: process.node_id for rank, process in ranks.items()}

    def _prestart(self) -> None:
        if self._spares:
            prestart_workers(set(self._nodes.values()), self._spares)

    def _warm_up_joiners(self) -> None:
        # Training runs on meanwhile: what a new process imports now costs no downtime.
        if not self._spares:
            return
        joining = set(alive_worker_nodes()) - set(self._nodes.values())
        if joining:
            prestart_workers(joining, self._spares)
            await_idle_workers(joining, timeout_s=self._head_start_s)

    def _dead(self, timeout_s: float = 5.0) -> dict[int, str]:
        # A busy process answers late and is alive; only a dead one makes the call fail.
        pings = [actor.get_metadata.remote() for actor in self._actors]
        ready = ray.wait(pings, num_returns=len(pings), timeout=timeout_s)[0] if pings else []
        found = {}
        for ping in ready:
            try:
                ray.get(ping)
            except ray.exceptions.RayError as error:
                found[pings.index(ping)] = type(error).__name__
        return found


def _end_run_if(answer: Any) -> None:
    """Raises if the coordinator answers with an error: the run must end."""
    error = ray.get(answer)
    if error is not None:
        # An exception in a hook is not retryable for Ray Train and ends the run.
        raise RuntimeError(error.line)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
