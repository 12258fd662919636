"""One rank under Ray Train: joins its group, runs the loop, reports how it ended."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.util import get_current_placement_group
from ray.util.metrics import Gauge

from elastic_kfac.cluster.ray.devices import backend_of, device_of_rank
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.membership import NeverAMember, membership_of, process_group
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

RANK_FUNCTION = "elastic_kfac.training.loop:run_rank"


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of every rank; travel with the training function."""

    config: Config
    run_uri: str
    coordinator: Any
    """Handle of the run coordinator."""
    rank_function: str = RANK_FUNCTION
    """`module:function` with the signature of `run_rank`."""
    collective_timeout_s: float = 120.0
    telemetry: TelemetryOptions | None = None
    """None exports and logs nothing."""
    membership_host: Any = None
    """Handle of the actor where members meet; None restarts the group at every change."""
    logical_gpus: bool = False
    """Whether the GPUs of `resources.use_gpu` are only Ray's numbers, and ranks use the CPU."""


def run_worker(settings: WorkerSettings) -> str:
    """The training function: returns the status in which the rank ended.

    Raises:
        Exception: As raised by the loop, after it was reported to the coordinator.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    coordinator = settings.coordinator
    node_id = ray.get_runtime_context().get_node_id()
    places = get_current_placement_group()
    joined = ray.get(coordinator.join.remote(rank, os.getpid(), node_id, places))
    attempt = int(joined["attempt"])
    if joined["over"]:
        return "finished"
    try:
        outcome = _run(settings, rank, world_size, joined)
    except NeverAMember:
        outcome = {"status": "parked"}
    except BaseException as error:
        description = RankError.of(rank, error)
        log_of("run").error(description.line, exc_info=True)
        ray.get(coordinator.rank_failed.remote(attempt, description))
        raise
    ray.get(coordinator.rank_left.remote(attempt, rank, outcome))
    return str(outcome["status"])


def _run(
    settings: WorkerSettings, rank: int, world_size: int, joined: Mapping[str, Any]
) -> dict[str, Any]:
    import torch

    from elastic_kfac.runs.final_record import result_row
    from elastic_kfac.state.checkpoint import CheckpointStore
    from elastic_kfac.training.in_place import run_member
    from elastic_kfac.training.measurement import RankProbe

    config, coordinator, attempt = settings.config, settings.coordinator, int(joined["attempt"])
    options, log_context = settings.telemetry, LogContext(settings.run_uri.rpartition("/")[2], rank)
    if options is not None:
        begin_log(log_context, options.log)
    torch.set_num_threads(config.train.torch_threads)
    device = device_of_rank(config, logical_gpus=settings.logical_gpus)
    # In place, any process may become rank 0 of a later world.
    reports = rank == 0 or settings.membership_host is not None
    rows = RankReporter(coordinator, attempt) if reports else None
    probe, export = RankProbe(), None
    followers: list[Callback] = [LogPosition(log_context)]
    if options is not None and options.exports:
        with probe.own_cpu():
            telemetry = RankTelemetry(options, rank, Gauge)
        export = MetricsExport(probe, telemetry, rows.measured if rows else lambda values: None)
        followers += [probe, export]
    callback = Callbacks(*followers, *([rows] if rows else []))
    store_reports = StoreReporter(coordinator, attempt, rows or Callback(), probe)
    durable = CheckpointStore(
        settings.run_uri,
        keep=config.elastic.keep_checkpoints,
        on_warning=store_reports.on_warning,
    )
    durable.after_save = store_reports.on_checkpoint
    store = ReplicatedStore(
        durable,
        lambda: ray.get(coordinator.replica_places.remote()),
        attempt=attempt,
        checkpoint_interval_s=config.elastic.checkpoint_interval_s,
        callback=store_reports,
    )
    control = CoordinatorControl(coordinator, attempt, joined["stop_reason"])
    backend = backend_of(config, device)
    stack = contextlib.ExitStack()
    try:
        if settings.membership_host is not None:
            outcome = run_member(
                config,
                membership_of(settings.membership_host, joined, control, backend=backend),
                store=store,
                callback=callback,
                control=control,
                device=device,
                repeat_rows=True,
            )
        else:
            seams: dict[str, Any] = {}
            if config.plan.decomposers:
                from elastic_kfac.cluster.ray.decomposers import Decomposers

                seams["pool"] = stack.enter_context(Decomposers(config.plan.decomposers))
            module, _, function = settings.rank_function.partition(":")
            run = getattr(importlib.import_module(module), function)
            with process_group(
                coordinator,
                rank,
                world_size,
                attempt,
                backend=backend,
                timeout_s=settings.collective_timeout_s,
            ) as communicator:
                outcome = run(
                    config,
                    communicator,
                    store=store,
                    callback=callback,
                    control=control,
                    device=device,
                    save_survivor=store.save_survivor,
                    **seams,
                )
        store.close()
    finally:
        stack.close()
        if export is not None:
            export.export()
        if rows is not None:
            rows.close()
    return {**result_row(config, outcome), "reasons": list(outcome.reasons)}
