"""Reports of a rank to the run coordinator, to Ray's metrics and to its log."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError

from elastic_kfac.cluster.run.messages import Message, Reporter
from elastic_kfac.cluster.run.replicas import StoreCallback
from elastic_kfac.observability.run_log import LogContext, log_of
from elastic_kfac.observability.telemetry import RankTelemetry, Values
from elastic_kfac.training.callbacks import Callback, Point, Trainer, event_row

if TYPE_CHECKING:
    from elastic_kfac.training.measurement import RankProbe


RETRY_S = 2.0


class RankReporter(Reporter):
    """Sends a rank's rows to the coordinator: in order, in batches, without waiting for it."""

    def __init__(self, coordinator: Any, attempt: int, *, interval_s: float = 0.05) -> None:
        self._coordinator = coordinator
        self._attempt = attempt
        self._interval_s = interval_s
        self._rows: queue.Queue[Message | None] = queue.Queue()
        self._is_over = False
        self._thread = threading.Thread(target=self._send_all, name="rank-reporter", daemon=True)
        self._thread.start()

    def measured(self, values: Mapping[str, Any]) -> None:
        """Sends what this rank has measured for the run since the last call."""
        self.send(("measured", values))

    def last_step(self) -> int:
        self.flush()
        return int(ray.get(self._coordinator.last_step.remote()))

    def wall_time_s(self) -> float:
        return float(ray.get(self._coordinator.wall_time.remote()))

    def flush(self, timeout_s: float = 30.0) -> None:
        """Returns when everything has arrived."""
        with self._rows.all_tasks_done:
            self._rows.all_tasks_done.wait_for(lambda: not self._rows.unfinished_tasks, timeout_s)

    def close(self) -> None:
        """Flushes and ends the sending thread."""
        self.flush()
        self._is_over = True
        self._rows.put(None)
        self._thread.join()

    def send(self, message: Message) -> None:
        self._rows.put(message)

    def _send_all(self) -> None:
        is_closing = False
        while not is_closing:
            taken = [self._rows.get()]
            while not self._rows.empty():
                taken.append(self._rows.get())
            is_closing = None in taken
            if rows := [row for row in taken if row is not None]:
                # One batch at a time: an actor with several callers at once may reorder calls.
                self._record(rows)
            for _ in taken:
                self._rows.task_done()
            time.sleep(self._interval_s)

    def _record(self, rows: Sequence[Message]) -> None:
        while not self._is_over:
            try:
                ray.get(self._coordinator.record.remote(self._attempt, rows))
                return
            except ActorDiedError:
                self._is_over = True  # and the run with it
            except Exception:
                log_of("run").warning("rows were not recorded; trying again", exc_info=True)
                time.sleep(RETRY_S)


class CoordinatorControl:
    """A rank's `Control`: a thread waits for the coordinator, the loop only reads a variable."""

    def __init__(self, coordinator: Any, attempt: int, stop_reason: str | None) -> None:
        self._reason = stop_reason
        if stop_reason is None:
            threading.Thread(
                target=self._wait, args=(coordinator, attempt), name="stop-reason", daemon=True
            ).start()

    def stop_reason(self) -> str | None:
        return self._reason

    def _wait(self, coordinator: Any, attempt: int) -> None:
        # The coordinator's end is the run's end; Ray ends this process then.
        with contextlib.suppress(Exception):
            self._reason = ray.get(coordinator.stop_reason.remote(attempt))


class LogPosition(Callback):
    """Keeps the rank and step of a process's log lines those of its trainer."""

    def __init__(self, context: LogContext) -> None:
        self._context = context
        self._trainer: Trainer | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._context.rank = trainer.communicator.rank
        self._context.step = lambda: trainer.progress.step

    def on_point(self, point: Point, step: int) -> None:
        # In place, the rank may change with every world.
        if point == "recovery" and self._trainer is not None:
            self._context.rank = self._trainer.communicator.rank


class MetricsExport(Callback):
    """Exports a rank's measurements about once a second, between two steps of the loop."""

    def __init__(
        self, probe: RankProbe, telemetry: RankTelemetry, report: Callable[[Values], None]
    ) -> None:
        """`report` receives the measurements for the run while this is rank 0 of its world."""
        self._probe, self._telemetry, self._report = probe, telemetry, report

    def on_point(self, point: Point, step: int) -> None:
        if point == "committed" and self._telemetry.is_due:
            self.export()

    def export(self) -> None:
        """Exports now."""
        with self._probe.own_cpu():
            if self._probe.is_rank_zero:
                self._report(self._probe.run_values())
            self._telemetry.export(self._probe.rank_values())


class StoreReporter(StoreCallback):
    """Reports what the rank's store does to the coordinator, the log and the probe."""

    def __init__(self, coordinator: Any, attempt: int, rows: Callback, probe: RankProbe) -> None:
        self._coordinator, self._attempt = coordinator, attempt
        self._rows, self._probe = rows, probe

    def on_warning(self, line: str) -> None:
        log_of("checkpoints").warning(line)
        self._rows.on_event(event_row("warning", self._rows.last_step(), reason=line))

    def on_restore(self, source: str, step: int) -> None:
        log_of("checkpoints").info(f"state found: {source}", extra={"fields": {"step": step}})
        self._rows.on_event(event_row("state_found", step, source=source))

    def on_rescue(self, rows: Sequence[Mapping[str, Any]]) -> None:
        messages = [("metrics", row) for row in rows]
        ray.get(self._coordinator.record.remote(self._attempt, messages))

    def on_replicated(self) -> None:
        self._probe.snapshot_replicated()

    def on_checkpoint(self, num_bytes: int, elapsed_s: float) -> None:
        """A durable checkpoint was written."""
        fields = {"checkpoint_bytes": num_bytes, "checkpoint_time_s": round(elapsed_s, 3)}
        log_of("checkpoints").info("checkpoint written", extra={"fields": fields})
        self._probe.checkpoint_written(num_bytes, elapsed_s)
