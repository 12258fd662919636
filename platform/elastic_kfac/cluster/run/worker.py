"""One rank under Ray Train: joins its group, runs the loop, tells how it ended."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.util import get_current_placement_group

from elastic_kfac.cluster.ray.devices import backend_of, device_of_rank
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.member import NeverAMember, membership_of
from elastic_kfac.cluster.run.membership_host import listening_store
from elastic_kfac.cluster.run.recorder import Message
from elastic_kfac.cluster.run.telemetry import LogPosition, RankTelemetry, TelemetryOptions
from elastic_kfac.errors import ElasticKfacError
from elastic_kfac.observability.run_log import LogContext, begin_log, log_of
from elastic_kfac.training.callbacks import Callback, Callbacks, event_row

if TYPE_CHECKING:
    import torch

    from elastic_kfac.communication.collectives import Communicator
    from elastic_kfac.config import Config

RANK_FUNCTION = "elastic_kfac.training.snapshots:run_rank_with_rescue"


@dataclass(frozen=True)
class WorkerSettings:
    """What every rank needs; travels with the training function."""

    config: Config
    run_uri: str
    recorder: Any
    """Handle of the recorder actor."""
    rank_function: str = RANK_FUNCTION
    """`module:function` with the signature of `run_rank`."""
    collective_timeout_s: float = 120.0
    telemetry: TelemetryOptions | None = None
    """What to tell Ray about the run; None tells nothing."""
    membership_host: Any = None
    """Handle of the actor where members meet; None restarts the group at every change."""
    logical_gpus: bool = False
    """Whether the GPUs of `resources.use_gpu` are only Ray's numbers, and ranks use the CPU."""


def run_worker(settings: WorkerSettings) -> str:
    """The training function: returns the status in which the rank ended.

    Raises:
        Exception: What the loop raised, after the recorder has been told.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    recorder = settings.recorder
    node_id = ray.get_runtime_context().get_node_id()
    places = get_current_placement_group()
    joined = ray.get(recorder.join.remote(rank, os.getpid(), node_id, places))
    attempt = int(joined["attempt"])
    if joined.get("over"):
        return "finished"
    try:
        outcome = _run(settings, rank, world_size, joined)
    except NeverAMember:
        outcome = {"status": "parked"}
    except BaseException as error:
        description = describe(rank, error)
        log_of("run").error(description.line, exc_info=True)
        ray.get(recorder.rank_failed.remote(attempt, description))
        raise
    ray.get(recorder.rank_left.remote(attempt, rank, outcome))
    return str(outcome["status"])


def describe(rank: int, error: BaseException) -> RankError:
    """An exception as a value that the driver can hold and show."""
    ours = isinstance(error, ElasticKfacError)
    text = str(error).strip().splitlines()
    return RankError(
        rank=rank,
        kind=type(error).__name__,
        line=error.line()
        if isinstance(error, ElasticKfacError)
        else f"{type(error).__name__}: {text[0] if text else ''}",
        traceback="".join(traceback.format_exception(error)),
        exit_code=error.exit_code if isinstance(error, ElasticKfacError) else 1,
        exception=error if ours else None,
    )


class RecorderPort(Callback):
    """The loop's rows to the recorder: rows leave in order, in batches, without waiting for it."""

    def __init__(
        self, recorder: Any, attempt: int, last_step: int, *, interval_s: float = 0.05
    ) -> None:
        self._recorder = recorder
        self._attempt = attempt
        self._last_step = last_step
        self._interval_s = interval_s
        self._rows: list[Message] = []
        self._ready = threading.Condition()
        self._sending = False
        self._closed = False
        self._thread = threading.Thread(target=self._send_all, name="recorder-port", daemon=True)
        self._thread.start()

    def on_metrics(self, row: Mapping[str, Any]) -> None:
        self._put(("metrics", dict(row)))

    def on_event(self, row: Mapping[str, Any]) -> None:
        self._put(("event", dict(row)))

    def on_step(self, row: Mapping[str, Any]) -> None:
        self._put(("progress", dict(row)))

    def last_step(self) -> int:
        return self._last_step

    def on_rollback(self, step: int, lost_steps: int) -> None:
        self._put(("rewound", {"step": step, "lost_steps": lost_steps}))

    def measured(self, values: Mapping[str, Any]) -> None:
        """What rank 0 has measured since the last time."""
        self._put(("measured", values))

    def flush(self, timeout_s: float = 30.0) -> None:
        """Returns when everything has arrived."""
        with self._ready:
            self._ready.wait_for(lambda: not self._rows and not self._sending, timeout_s)

    def close(self) -> None:
        """Flushes and ends the sending thread."""
        self.flush()
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        self._thread.join()

    def _put(self, message: Message) -> None:
        with self._ready:
            self._rows.append(message)
            self._ready.notify_all()

    def _send_all(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._rows or self._closed)
                if not self._rows:
                    return
                rows, self._rows, self._sending = self._rows, [], True
            # One batch at a time: an actor with several callers at once may reorder calls.
            ray.get(self._recorder.record.remote(self._attempt, rows))
            with self._ready:
                self._sending = False
                self._ready.notify_all()
            time.sleep(self._interval_s)


class MemberPort(RecorderPort):
    """The port of a process that may become rank 0 in any world of its group."""

    def last_step(self) -> int:
        self.flush()
        return int(ray.get(self._recorder.last_step.remote()))


class RecorderControl:
    """The loop's control: a thread waits for the recorder, the loop only reads a variable."""

    def __init__(self, recorder: Any, attempt: int, stop_reason: str | None) -> None:
        self._reason = stop_reason
        if stop_reason is None:
            threading.Thread(
                target=self._wait, args=(recorder, attempt), name="stop-signal", daemon=True
            ).start()

    def stop_reason(self) -> str | None:
        return self._reason

    def _wait(self, recorder: Any, attempt: int) -> None:
        # The recorder's end is the run's end; Ray ends this process then.
        with contextlib.suppress(Exception):
            self._reason = ray.get(recorder.stop_reason.remote(attempt))


def _run(
    settings: WorkerSettings, rank: int, world_size: int, joined: Mapping[str, Any]
) -> dict[str, Any]:
    import torch

    from elastic_kfac.cluster.run.vault_store import VaultStore
    from elastic_kfac.runs.results import result_row
    from elastic_kfac.state.checkpoint import CheckpointStore
    from elastic_kfac.training.in_place import run_member
    from elastic_kfac.training.measurement import RankProbe

    config = settings.config
    options, log_context = settings.telemetry, LogContext(settings.run_uri.rpartition("/")[2], rank)
    if options is not None:
        begin_log(log_context, options.log)
    torch.set_num_threads(config.train.torch_threads)
    device = device_of_rank(config, logical_gpus=settings.logical_gpus)
    attempt = int(joined["attempt"])
    module_name, _, function_name = settings.rank_function.partition(":")
    rank_function = getattr(importlib.import_module(module_name), function_name)
    port = Callback()
    if settings.membership_host is not None:
        port = MemberPort(settings.recorder, attempt, int(joined["last_step"]))
    elif rank == 0:
        port = RecorderPort(settings.recorder, attempt, int(joined["last_step"]))

    def warn(line: str) -> None:
        log_of("checkpoints").warning(line)
        port.on_event(event_row("warning", int(joined["last_step"]), reason=line))

    def found(source: str, step: int) -> None:
        log_of("checkpoints").info(f"state found: {source}", extra={"fields": {"step": step}})
        port.on_event(event_row("state_found", step, source=source))

    def written(num_bytes: int, elapsed_s: float) -> None:
        fields = {"checkpoint_bytes": num_bytes, "checkpoint_time_s": round(elapsed_s, 3)}
        log_of("checkpoints").info("checkpoint written", extra={"fields": fields})
        probe.checkpoint_written(num_bytes, elapsed_s)

    def rescued(rows: Sequence[Mapping[str, Any]]) -> None:
        ray.get(settings.recorder.record.remote(attempt, [("metrics", row) for row in rows]))

    probe, telemetry = RankProbe(), None
    if options is not None and options.exports:
        tell_run = port.measured if isinstance(port, RecorderPort) else None
        telemetry = RankTelemetry(probe, options, rank, tell_run=tell_run)
    durable = CheckpointStore(
        settings.run_uri, keep=config.elastic.keep_checkpoints, on_warning=warn
    )
    durable.after_save = written
    store = VaultStore(
        durable,
        lambda: ray.get(settings.recorder.vaults.remote()),
        attempt=attempt,
        checkpoint_interval_s=config.elastic.checkpoint_interval_s,
        on_warning=warn,
        on_restore=found,
        on_rescue=rescued,
        on_kept=probe.snapshot_kept,
    )
    control = RecorderControl(settings.recorder, attempt, joined["stop_reason"])
    try:
        probes = [probe] if telemetry is not None else []
        callback = Callbacks(LogPosition(log_context), *probes, port)
        if settings.membership_host is not None:
            backend = backend_of(config, device)
            membership = membership_of(settings.membership_host, joined, control, backend=backend)
            outcome = run_member(
                config,
                membership,
                store=store,
                callback=callback,
                control=control,
                device=device,
                repeat_rows=True,
            )
        else:
            with process_group(settings, rank, world_size, attempt, device) as communicator:
                outcome = rank_function(
                    config,
                    communicator,
                    store=store,
                    callback=callback,
                    control=control,
                    device=device,
                )
        store.close()
    finally:
        if telemetry is not None:
            telemetry.export()
        if isinstance(port, RecorderPort):
            port.close()
    return {**result_row(config, outcome), "reasons": list(outcome.reasons)}


@contextlib.contextmanager
def process_group(
    settings: WorkerSettings, rank: int, world_size: int, attempt: int, device: torch.device
) -> Iterator[Communicator]:
    """The group of this attempt: owned here, so that a later one can be made in the same process.

    A rank that leaves with an exception does not take part in an orderly end: its process ends
    soon, and that wakes the others.
    """
    from elastic_kfac.communication.collectives import Communicator
    from elastic_kfac.training.regroup import leave, regroup

    if world_size == 1:
        yield Communicator.solo()
        return
    timeout = timedelta(seconds=settings.collective_timeout_s)
    store = _rendezvous(settings.recorder, rank, world_size, attempt, timeout)
    yield regroup(
        attempt,
        rank,
        world_size,
        store,
        backend=backend_of(settings.config, device),
        timeout_s=settings.collective_timeout_s,
    )
    leave()


def _rendezvous(recorder: Any, rank: int, world_size: int, attempt: int, timeout: timedelta) -> Any:
    from torch.distributed import TCPStore

    if rank == 0:
        host = ray.util.get_node_ip_address()
        store, port = listening_store(host, world_size, timeout)
        ray.get(recorder.publish_store.remote(host, port))
        return store
    host, port = ray.get(recorder.store_address.remote(attempt))
    return TCPStore(host, port, world_size, is_master=False, timeout=timeout)
