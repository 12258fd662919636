"""A member of a world that changes in place: an actor in a placement group of its own."""

from __future__ import annotations

import importlib
import os
import threading
from typing import TYPE_CHECKING, Any

import ray

from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.membership import NeverAMember, membership_of
from elastic_kfac.cluster.run.worker import RankSeams, WorkerSettings, function_named
from elastic_kfac.observability.run_log import LogContext, log_of

if TYPE_CHECKING:
    from elastic_kfac.training.membership import Membership

_IMPORTED_LATE = ("torch.distributed", "elastic_kfac.training.in_place")


class Member:
    """The actor. Its methods are called while `run` is under way, so that it needs several threads."""

    def __init__(self) -> None:
        self._membership: Membership | None = None
        self._leaves = threading.Event()

    def prepare(self) -> tuple[int, str]:
        """Imports what a rank needs while the others step; the process's id and its node's."""
        for module in _IMPORTED_LATE:
            importlib.import_module(module)
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def ping(self) -> None:
        """Answers unless the process hangs."""

    def leave(self) -> None:
        """Makes this process leave the world at the next boundary."""
        self._leaves.set()
        if self._membership is not None:
            self._membership.leave_at_next_boundary()

    def run(
        self, settings: WorkerSettings, attempt: int, address: tuple[str, int], slot: int
    ) -> dict[str, Any]:
        """Trains as slot `slot` of the worlds that meet at `address`; returns how it ended.

        Raises:
            Exception: As raised by the loop, after it was reported to the coordinator.
        """
        context = LogContext(settings.run_uri.rpartition("/")[2], slot)
        try:
            with RankSeams(settings, attempt, context) as seams:
                membership = membership_of(address, slot, seams.control, backend=seams.backend)
                self._membership = membership
                if self._leaves.is_set():
                    membership.leave_at_next_boundary()
                outcome = function_named(str(settings.member_function))(
                    settings.config,
                    membership,
                    store=seams.store,
                    callback=seams.callback,
                    control=seams.control,
                    device=seams.device,
                    repeat_rows=True,
                )
                return seams.end(outcome)
        except NeverAMember:
            return {"status": "parked"}
        except BaseException as error:
            description = RankError.of(context.rank or 0, error)
            log_of("run").error(description.line, exc_info=True)
            ray.get(settings.coordinator.rank_failed.remote(attempt, description))
            raise
