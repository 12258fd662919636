"""Tells Ray what a run does and measures: metrics for Prometheus, lines for the log.

The recorder exports what is true of the whole run, because it outlives the workers; ranks export only
what each of them knows for itself (`exporter="rank"` in the table). Counters are Ray gauges that hold
the running total and begin with 0: see `metric_names`. Values are exported about once a second, not
at every step, so that measuring costs little whatever a step takes; all of them every time, because
Ray exports only what was set since its last report.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ray.util.metrics import Gauge

from elastic_kfac.errors import CommunicationError
from elastic_kfac.observability.metric_names import METRICS, OTHER, Metric, label
from elastic_kfac.observability.run_log import LogContext, begin_log, log_of
from elastic_kfac.training.callbacks import Callback, Point, Trainer

if TYPE_CHECKING:
    from elastic_kfac.cluster.run.vault import VaultPlace
    from elastic_kfac.training.measurement import Labels, RankProbe, Values

INTERVAL_S = 1.0
"""Between two exports of values that change at every step."""

VAULTS_INTERVAL_S = 5.0
"""Between two questions to the vaults."""

_ENTRIES = {entry.column: entry for entry in METRICS}

STATES = label("state").values

_OF_PROGRESS = (
    "step",
    "epoch",
    "loss",
    "accuracy",
    "lr",
    "loss_scale",
    "step_time_s",
    "wall_time_s",
    "train_time_s",
    "samples_per_s",
    "global_batch_size",
    "world_size",
    "data_wait_s",
    "wanted_workers",
)
_OF_ROWS = (
    "eval_loss",
    "eval_accuracy",
    "eval_adversarial_loss",
    "eval_adversarial_accuracy",
    "adversarial_fraction",
    "merged_workers",
    "merge_newton_rank",
    "merge_sigma",
    "computation_s",
    "communication_s",
    "hessian_eigenvalue",
    "kfac_eigenvalue",
    "eigenvalue_correlation",
    "hessian_time_s",
    "hessian_s",
)
"""What only rows of `metrics.jsonl` say, some of them seldom: the newest value stays."""
_CHANGES = ("resize", "recovery")
_OF_RESIZES = (*_CHANGES, "failure", "preemption")
_ALARMING = ("failure", "preemption", "warning")
_SAID_ELSEWHERE = ("time", "kind", "step", "reason")


@dataclass(frozen=True)
class TelemetryOptions:
    """What an exporter has to know; travels to the recorder and to every rank."""

    run: str
    min_workers: int
    max_workers: int
    exports: bool = True
    """Whether metrics are exported; the log is written anyway."""
    log: str = ""
    """Levels of the log, as `ELASTIC_KFAC_LOG` has them."""


class SettableGauge(Protocol):
    """The part of `ray.util.metrics.Gauge` that is used."""

    def set(self, value: float, tags: dict[str, str]) -> None: ...


MakeGauge = Callable[[str, str, tuple[str, ...]], SettableGauge]


class _NoGauge:
    def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
        pass

    def set(self, value: float, tags: dict[str, str]) -> None:
        return None


class Series:
    """The series of one exporter: names, bounds of labels, and totals of counters."""

    def __init__(
        self,
        exporter: Literal["recorder", "rank"],
        fixed: Mapping[str, str],
        *,
        make_gauge: MakeGauge = Gauge,
    ) -> None:
        """Creates every gauge of the exporter, and sets counters to 0 wherever all labels are known.

        Args:
            exporter: Whose metrics of the table.
            fixed: Values of the labels that are the same in all of its series (run, rank).
            make_gauge: Ray's gauge, or a stand-in.
        """
        self._exporter = exporter
        self._fixed = {name: value if len(value) <= 100 else OTHER for name, value in fixed.items()}
        self._gauges: dict[str, SettableGauge] = {}
        self._values: dict[tuple[str, Labels], tuple[float, dict[str, str]]] = {}
        self._totals: dict[tuple[str, Labels], float] = {}
        self._seen: dict[str, set[str]] = {}
        for entry in METRICS:
            if entry.exporter != exporter:
                continue
            self._gauges[entry.column] = make_gauge(entry.exported_name, entry.help, entry.labels)
            if entry.kind == "counter":
                known = [label(name).values for name in self._free(entry)]
                for labels in product(*known):
                    self.add(entry.column, 0.0, labels)

    def set(self, column: str, value: float, labels: Labels = ()) -> None:
        """Notes the value of a gauge for the next `flush`.

        Raises:
            KeyError: If this exporter has no such metric.
        """
        self._note(_ENTRIES[column], float(value), labels)

    def add(self, column: str, amount: float, labels: Labels = ()) -> None:
        """Notes that a counter has grown; negative amounts are not counted."""
        entry = _ENTRIES[column]
        labels = self._admitted(entry, labels)
        total = self._totals.get((column, labels), 0.0) + max(0.0, amount)
        self._totals[column, labels] = total
        self._note(entry, total, labels)

    def raise_to(self, column: str, total: float, labels: Labels = ()) -> None:
        """Notes the running total of a counter; it never falls."""
        admitted = self._admitted(_ENTRIES[column], labels)
        self.add(column, total - self._totals.get((column, admitted), 0.0), labels)

    def note(self, values: Values, *, totals: bool) -> None:
        """Notes values by column and labels; counters are totals or growth since the last time."""
        for column, by_label in values.items():
            counter = _ENTRIES[column].kind == "counter"
            for labels, value in by_label.items():
                if not counter:
                    self.set(column, value, labels)
                elif totals:
                    self.raise_to(column, value, labels)
                else:
                    self.add(column, value, labels)

    def _free(self, entry: Metric) -> list[str]:
        return [name for name in entry.labels if name not in self._fixed]

    def _admitted(self, entry: Metric, labels: Labels) -> Labels:
        admitted = []
        for name, value in zip(self._free(entry), labels, strict=True):
            seen = self._seen.setdefault(name, set())
            value = label(name).admit(value, seen)
            seen.add(value)
            admitted.append(value)
        return tuple(admitted)

    def _note(self, entry: Metric, value: float, labels: Labels) -> None:
        labels = self._admitted(entry, labels)
        free = zip(self._free(entry), labels, strict=True)
        fixed = {name: text for name, text in self._fixed.items() if name in entry.labels}
        self._values[entry.column, labels] = (value, {**fixed, **dict(free)})

    def flush(self) -> None:
        """Hands every value to Ray, which forgets what is not said again before its next report."""
        for (column, _), (value, tags) in list(self._values.items()):
            self._gauges[column].set(value, tags)


class RunTelemetry:
    """The recorder's exporter: what is true of the whole run."""

    def __init__(
        self,
        options: TelemetryOptions | None,
        *,
        make_gauge: MakeGauge = Gauge,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Says that the run is starting; without options it exports and logs nothing, ever."""
        self._exports = options is not None and options.exports
        if options is not None:
            begin_log(LogContext(options.run, step=lambda: self._row.get("step")), options.log)
        options = options or TelemetryOptions("", 0, 0)
        self._series = Series(
            "recorder",
            {"run": options.run},
            make_gauge=make_gauge if self._exports else _NoGauge,
        )
        self._clock = clock
        self._vaults_asked_at = float("-inf")
        self._row: Mapping[str, Any] = {}
        self._flushing = threading.RLock()
        self._samples: int | None = None
        self._series.set("min_workers", options.min_workers)
        self._series.set("max_workers", options.max_workers)
        self.state("starting")
        if self._exports:
            threading.Thread(target=self._repeat, name="telemetry", daemon=True).start()

    def state(self, now: str, reason: str = "") -> None:
        """What the run is doing: 1 for this state, 0 for every other one."""
        log_of("run").info(f"{now}: {reason}" if reason else now, extra={"fields": {"state": now}})
        for state in STATES:
            self._series.set("run_state", float(state == now), (state,))
        self.flush()

    def stepped(self, row: Mapping[str, Any]) -> None:
        """A step was committed."""
        if self._samples is None:
            self._samples = int(row.get("samples", 0)) - int(row.get("global_batch_size", 0))
        self._row = row

    def logged(self, row: Mapping[str, Any]) -> None:
        """A row of `metrics.jsonl`: of a step, an evaluation or the end of an epoch."""
        log_of("steps").info("metrics", extra={"fields": row})
        for column in _OF_ROWS:
            if row.get(column) is not None:
                self._series.set(column, row[column])
        if "loss" in row:
            # A step in which nothing was attacked does not say so.
            self._series.set("adversarial_fraction", row.get("adversarial_fraction", 0.0))

    def measured(self, values: Values) -> None:
        """What rank 0 has measured since the last time."""
        self._series.note(values, totals=False)

    def event(self, row: Mapping[str, Any]) -> None:
        """A row of `events.jsonl`."""
        kind = row["kind"]
        self._log_event(kind, row)
        series = self._series
        if kind == "failure":
            series.add("failures", 1)
        elif kind == "preemption":
            series.add("preemptions", 1)
            if row.get("notice_s") is not None:
                series.set("notice_s", row["notice_s"])
        if row.get("hand_over_s") is not None:
            series.set("hand_over_s", row["hand_over_s"])
        if kind in _CHANGES:
            series.add("resizes", 1, (kind,))
            series.set("downtime_s", row["downtime_s"])
            series.add("lost_time_s", row["downtime_s"])
            for moment, elapsed_s in row.get("phases_s", {}).items():
                series.set("moment_s", elapsed_s, (moment,))
        if kind in (*_CHANGES, "continue"):
            series.add("steps_redone", row.get("steps_redone") or 0)

    def _log_event(self, kind: str, row: Mapping[str, Any]) -> None:
        log = log_of("resizes" if kind in _OF_RESIZES else "run")
        said = {name: value for name, value in row.items() if name not in _SAID_ELSEWHERE}
        log.log(
            logging.WARNING if kind in _ALARMING else logging.INFO,
            f"{kind}: {row['reason']}" if row.get("reason") else kind,
            extra={"fields": {"event": kind, "step": row.get("step"), **said}},
        )

    def rank_failed(self, kind: str) -> None:
        """A rank ended with an error of this class."""
        if kind == CommunicationError.__name__:
            self._series.add("communication_errors", 1)

    def ask_vaults(self, places: Sequence[VaultPlace]) -> None:
        """Has the vaults say what they hold, unless they were asked a moment ago."""
        if self._exports and places and self._clock() - self._vaults_asked_at >= VAULTS_INTERVAL_S:
            self._vaults_asked_at = self._clock()
            self._asking = asyncio.create_task(self._sum_vaults(places))

    async def _sum_vaults(self, places: Sequence[VaultPlace]) -> None:
        # A vault that is gone is replaced by the driver; the next answer counts.
        with contextlib.suppress(Exception):
            answers = [place.vault.notes.remote(0) for place in places]
            held = await asyncio.wait_for(asyncio.gather(*answers), VAULTS_INTERVAL_S)
            self._series.set("vault_bytes", sum(note.num_bytes for notes in held for note in notes))

    def flush(self) -> None:
        """Exports everything, the newest step included, now."""
        with self._flushing:
            self._flush()

    def _flush(self) -> None:
        row = self._row
        for column in _OF_PROGRESS:
            if row.get(column) is not None:
                self._series.set(column, row[column])
        samples = int(row.get("samples", 0))
        if self._samples is not None and samples > self._samples:
            # Steps that are computed again are not counted again.
            self._series.add("samples", samples - self._samples)
            self._samples = samples
        self._series.flush()

    def _repeat(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            self.flush()


class RankTelemetry:
    """A rank's exporter: asks its probe about once a second, between two steps of the loop."""

    def __init__(
        self,
        probe: RankProbe,
        options: TelemetryOptions,
        rank: int,
        *,
        tell_run: Callable[[Values], None] | None = None,
        make_gauge: MakeGauge = Gauge,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins to listen to the probe.

        Args:
            probe: Measures this rank.
            options: Of the run.
            rank: Number of this rank; from the label's bound on they share a series.
            tell_run: Is given what is true of the whole run while this is rank 0.
            make_gauge: Ray's gauge, or a stand-in.
            clock: Monotonic time in s.
        """
        self._probe = probe
        self._tell_run = tell_run
        self._clock = clock
        self._exported_at = clock()
        bounded = str(rank) if rank < label("rank").most else OTHER
        with probe.own_cpu():
            self._series = Series(
                "rank", {"run": options.run, "rank": bounded}, make_gauge=make_gauge
            )
        probe.after_commit = self._when_due

    def export(self) -> None:
        """Exports now."""
        self._exported_at = self._clock()
        with self._probe.own_cpu():
            self._series.note(self._probe.of_the_rank(), totals=True)
            if self._tell_run is not None and self._probe.speaks_for_the_run:
                self._tell_run(self._probe.of_the_run())
            self._series.flush()

    def _when_due(self) -> None:
        if self._clock() - self._exported_at >= INTERVAL_S:
            self.export()


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
