"""Ray Train replaces single ranks: the second file that touches what Ray does not promise to keep.

Written for Ray 2.60. A backend with `has_replica_groups` makes Ray Train replace only the workers that
failed, in the same places of the placement group, while the others run on, as long as the number of
workers stays the same. What it needs beyond that, each checked by a test:

* a second dead worker makes the replacement fail with an `ActorDiedError`, which would end the run: all
  dead replica groups are shut down first, and the error is made one that is tried again;
* a replacement without a place would block: the hook waits until the placement group is whole again;
* when the place stays away, the survivors park and the whole group is started again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.failure_handling import default as failure_policy

from elastic_kfac.cluster.ray.adapter import (
    POLICY_CACHE_S,
    ElasticCallback,
    GroupListener,
    RunIsOver,
    await_lost_nodes,
    prestart_workers,
    refresh_capacity,
)


class MemberListener(GroupListener, Protocol):
    """What the callback asks and tells beyond changes of the whole group."""

    def members_lost(self, errors: Mapping[int, str], lost_nodes: Sequence[str]) -> str | None:
        """Some ranks are gone and others step on; returns why the run must end, or None."""
        ...

    def is_over(self) -> bool:
        """Whether everybody who is there has left for good."""
        ...

    def fall_back(self, reason: str) -> bool:
        """Parks the survivors; True means that the run is over."""
        ...


class _NoGroup(Backend):
    """Leaves the process group to the training function."""


@dataclass
class OwnGroupBackend(TorchConfig):
    """For `TorchTrainer`: the training function makes and ends the process group itself."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _NoGroup


class _Replicas(Backend):
    has_replica_groups = True


class ReplicaBackend(OwnGroupBackend):
    """For `TorchTrainer`: ranks are replaced one by one; the training function owns the group."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Replicas


class InPlaceCallback(ElasticCallback):
    """Lets survivors step on while a lost rank is replaced; otherwise an `ElasticCallback`."""

    def __init__(
        self, listener: MemberListener, *, wait_s: float, min_workers: int, **options: Any
    ) -> None:
        """Created by the driver, runs in Ray Train's controller.

        Args:
            listener: Is asked and told what happens.
            wait_s: How long survivors go on without a place for the lost ranks.
            min_workers: With fewer survivors the group parks at once.
            options: Those of `ElasticCallback`.
        """
        super().__init__(listener, **options)
        self._members = listener
        self._wait_s = wait_s
        self._min_workers = min_workers
        self._group: Any = None
        self._replacing = False

    def after_controller_start(self, train_run_context: Any) -> None:
        """A worker that dies while another one is replaced is one more failure, not the end."""
        super().after_controller_start(train_run_context)
        retryable = failure_policy.RETRYABLE_CONTROLLER_ERRORS
        if ray.exceptions.RayActorError not in retryable:
            failure_policy.RETRYABLE_CONTROLLER_ERRORS = (
                *retryable,
                ray.exceptions.RayActorError,
            )

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Keeps the group: its workers change."""
        super().after_worker_group_start(worker_group)
        self._group = worker_group
        self._replacing = False

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Learns of replacements."""
        super().after_worker_group_poll_status(worker_group_status)
        if self._replacing and not worker_group_status.errors:
            self._replacing = False
            self._learn_workers(self._group)
            if self._spares:
                prestart_workers({rank.node_id for rank in self._ranks}, self._spares)

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Keeps the survivors going until there is a place for the lost ranks."""
        survivors = self._survivors() if self._training else []
        if not survivors:
            self._replacing = False
            super().before_controller_execute_failure_decision(failure_decision)
            return
        errors, self._errors = self._errors, {}
        lost = await_lost_nodes({rank.node_id for rank in self._ranks})
        verdict = self._members.members_lost(errors, lost)
        if verdict is not None:
            raise RuntimeError(verdict)
        doubt = self._wait_for_room(len(survivors))
        if doubt is None:
            self._replacing = True
        else:
            self._fall_back(doubt)
        refresh_capacity()
        time.sleep(POLICY_CACHE_S)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Replacing ranks needs no parking; a change of the number of workers does."""
        if self._replacing and self._group is not None:
            if resize_decision.num_workers == len(self._group.get_workers()):
                return
            self._fall_back(f"Ray plans {resize_decision.num_workers} workers now")
        elif self._training and len(self._survivors()) < len(self._group.get_workers()):
            # The plan is smaller because a worker was lost, which Ray Train has not noticed yet.
            raise WorkerGroupStartupFailedError("a worker was lost before the group was resized")
        super().before_controller_execute_resize_decision(resize_decision)

    # ---- inside ----------------------------------------------------------------------------

    def _survivors(self) -> list[Any]:
        """Asks all workers now; ends the replica groups of those that are gone."""
        self._group.poll_status(timeout=2.0)
        failing = self._group.get_latest_poll_status().failing_replica_group_indices
        replicas = self._group.get_replica_groups()
        for index in failing:
            replicas[index].shutdown()
        alive = [
            worker
            for index, replica in enumerate(replicas)
            if index not in failing and replica.is_active()
            for worker in replica.get_workers()
        ]
        self._actors = tuple(worker.actor for worker in alive)
        return alive

    def _wait_for_room(self, survivors: int) -> str | None:
        """Returns None once the lost ranks have places, or why nobody should wait any longer."""
        if survivors < self._min_workers:
            return f"{survivors} of at least {self._min_workers} workers are left"
        handle = self._group.get_worker_group_state().placement_group_handle
        deadline = time.monotonic() + self._wait_s
        while True:
            if self._members.is_over():
                raise RunIsOver
            state = ray.util.placement_group_table(handle.placement_group).get("state")
            if state == "CREATED":
                return None
            if time.monotonic() > deadline:
                return f"no node took the place of the lost one within {self._wait_s:g} s"
            if len(self._survivors()) < survivors:
                return "another worker was lost while the place of the first was waited for"
            time.sleep(0.2)

    def _fall_back(self, reason: str) -> None:
        if self._members.fall_back(reason):
            raise RunIsOver
        for replica in self._group.get_replica_groups():
            replica.shutdown()
        # Now all of them are failing, so that Ray starts the whole group again.
        self._group.poll_status(timeout=5.0)
        self._training = self._replacing = False
        self._errors = {}
