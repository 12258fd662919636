"""One rank under Ray Train: joins its group, runs the loop, reports how it ended."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.util import get_current_placement_group
from ray.util.metrics import Gauge

from elastic_kfac.cluster.ray.devices import backend_of, device_of_rank
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.membership import process_group
from elastic_kfac.cluster.run.mode import RANK_FUNCTION
from elastic_kfac.cluster.run.replicas import ReplicatedStore
from elastic_kfac.cluster.run.reporting import (
    CoordinatorControl,
    LogPosition,
    MetricsExport,
    RankReporter,
    StoreReporter,
)
from elastic_kfac.observability.run_log import LogContext, begin_log, log_of
from elastic_kfac.observability.telemetry import RankTelemetry, TelemetryOptions
from elastic_kfac.training.callbacks import Callback, Callbacks

if TYPE_CHECKING:
    from elastic_kfac.config import Config
    from elastic_kfac.training.loop import Outcome


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of every rank; travel with the training function."""

    config: Config
    run_uri: str
    coordinator: Any
    """Handle of the run coordinator."""
    rank_function: str = RANK_FUNCTION
    """`module:function` with the signature of `run_rank`."""
    member_function: str | None = None
    """`module:function` with the signature of `run_member`; None where ranks are workers of Ray Train."""
    collective_timeout_s: float = 120.0
    telemetry: TelemetryOptions | None = None
    """None exports and logs nothing."""
    share: Callable[[], int] | None = None
    """How many workers the run may use, where ranks are members of worlds that change in place."""
    spare_processes: int = 0
    """Idle worker processes to keep ready on every node of a member."""
    places: str = ""
    """Begins the names of the members' places."""
    hangs_after_s: float = 20.0
    """A member that does not answer for so long is ended."""
    logical_gpus: bool = False
    """Whether the GPUs of `resources.use_gpu` are only Ray's numbers, and ranks use the CPU."""


def run_worker(settings: WorkerSettings) -> str:
    """The training function: returns the status in which the rank ended.

    Raises:
        Exception: As raised by the loop, after it was reported to the coordinator.
    """
    # Members of worlds that change in place use this module, too, and do without.
    from ray.train import get_context

    context = get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    coordinator = settings.coordinator
    places = get_current_placement_group()
    joined = ray.get(coordinator.join.remote(rank, places))
    attempt = int(joined["attempt"])
    log_context = LogContext(settings.run_uri.rpartition("/")[2], rank)
    try:
        stop_reason = joined["stop_reason"]
        with (
            RankSeams(settings, attempt, log_context, rank == 0, stop_reason) as seams,
            contextlib.ExitStack() as stack,
        ):
            pool: dict[str, Any] = {}
            if settings.config.plan.decomposers:
                from elastic_kfac.cluster.ray.decomposers import Decomposers

                pool["pool"] = stack.enter_context(Decomposers(settings.config.plan.decomposers))
            run = function_named(settings.rank_function)
            with process_group(
                coordinator,
                rank,
                world_size,
                attempt,
                backend=seams.backend,
                timeout_s=settings.collective_timeout_s,
            ) as communicator:
                outcome = run(
                    settings.config,
                    communicator,
                    store=seams.store,
                    callback=seams.callback,
                    control=seams.control,
                    device=seams.device,
                    save_survivor=seams.store.save_survivor,
                    **pool,
                )
            row = seams.end(outcome)
    except BaseException as error:
        description = RankError.of(rank, error)
        log_of("run").error(description.line, exc_info=True)
        ray.get(coordinator.rank_failed.remote(attempt, description))
        raise
    ray.get(coordinator.rank_left.remote(attempt, rank, row))
    return str(row["status"])


def function_named(name: str) -> Callable[..., Any]:
    """The function with a name of the form `module:function`."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


class RankSeams:
    """What the loop of a rank needs from its cluster: store, callback, control, device, backend.

    A context manager that sends what is left to be reported.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        attempt: int,
        log_context: LogContext,
        reports: bool = True,
        stop_reason: str | None = None,
    ) -> None:
        """Opens the run's folder and connects to the coordinator.

        Args:
            log_context: Names this rank in its log.
            reports: Whether this process is or may become rank 0.
            stop_reason: Why the run has to stop already.
        """
        import torch

        from elastic_kfac.state.checkpoint import CheckpointStore
        from elastic_kfac.training.measurement import RankProbe

        self._config = config = settings.config
        coordinator, options = settings.coordinator, settings.telemetry
        if options is not None:
            begin_log(log_context, options.log)
        torch.set_num_threads(config.train.torch_threads)
        self.device = device_of_rank(
            config,
            logical_gpus=settings.logical_gpus,
            is_member=settings.member_function is not None,
        )
        self.backend = backend_of(config, self.device)
        self._rows = rows = RankReporter(coordinator, attempt) if reports else None
        probe = RankProbe()
        self._export: MetricsExport | None = None
        followers: list[Callback] = [LogPosition(log_context)]
        if options is not None and options.exports:
            with probe.own_cpu():
                telemetry = RankTelemetry(options, log_context.rank or 0, Gauge)
            measured = rows.measured if rows else lambda values: None
            self._export = MetricsExport(probe, telemetry, measured)
            followers += [probe, self._export]
        self.callback = Callbacks(*followers, *([rows] if rows else []))
        store_reports = StoreReporter(coordinator, attempt, rows or Callback(), probe)
        durable = CheckpointStore(
            settings.run_uri,
            keep=config.elastic.keep_checkpoints,
            on_warning=store_reports.on_warning,
        )
        durable.after_save = store_reports.on_checkpoint
        self.store = ReplicatedStore(
            durable,
            lambda: ray.get(coordinator.replica_places.remote()),
            attempt=attempt,
            checkpoint_interval_s=config.elastic.checkpoint_interval_s,
            callback=store_reports,
        )
        self.control = CoordinatorControl(coordinator, attempt, stop_reason)

    def end(self, outcome: Outcome) -> dict[str, Any]:
        """Waits for the store; returns the outcome as the columns of the run's result."""
        from elastic_kfac.runs.final_record import result_row

        self.store.close()
        return {**result_row(self._config, outcome), "reasons": list(outcome.reasons)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._export is not None:
            self._export.export()
        if self._rows is not None:
            self._rows.close()
