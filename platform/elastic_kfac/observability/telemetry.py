"""Exports what a run does and measures: series for Prometheus, lines for the log.

The run coordinator exports what is true of the whole run, because it outlives the workers; ranks
export only their own measurements (`exporter="rank"` in the table). Counters are Ray gauges that hold
the running total and begin with 0: see `metric_names`. Values are exported about once a second, not at
every step, so that measuring costs little however short a step is; all of them every time, because Ray
exports only what was set since its last report.

Exporters receive values and a factory of gauges (`ray.util.metrics.Gauge`); they import neither Ray nor
the trainer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from elastic_kfac.errors import CommunicationError
from elastic_kfac.observability.metric_names import METRICS, OTHER, Metric, label, metric
from elastic_kfac.observability.quality import main_value
from elastic_kfac.observability.run_log import LogContext, begin_log, log_of

INTERVAL_S = 1.0
"""Between two exports of values that change at every step."""

Labels = tuple[str, ...]
"""Values of a metric's labels besides run and rank, in the order of the table."""
Values = dict[str, dict[Labels, float]]
"""Column -> label values -> number."""

_OF_ROWS = tuple(
    entry.column
    for entry in METRICS
    if (entry.exporter, entry.kind, entry.labels) == ("coordinator", "gauge", ("run",))
)
"""Columns whose newest value in any row stands for the run; rows that lack one keep the last value."""

_CHANGES = ("resize", "recovery")
_OF_RESIZES = (*_CHANGES, "failure", "preemption")
_ALARMING = ("failure", "preemption", "warning", "slow_rank")
_LOGGED_ELSEWHERE = ("time", "kind", "step", "reason")


@dataclass(frozen=True)
class TelemetryOptions:
    """Settings of exporters; travel to the coordinator and to every rank."""

    run: str
    min_workers: int
    max_workers: int
    exports: bool = True
    """Whether metrics are exported; the log is written anyway."""
    log: str = ""
    """Levels of the log, in the syntax of `ELASTIC_KFAC_LOG`."""


MakeGauge = Callable[[str, str, tuple[str, ...]], Any]
"""`ray.util.metrics.Gauge`, or what has its `set(value, tags)`."""


class Series:
    """The series of one exporter: names, bounds of labels, and totals of counters."""

    def __init__(
        self,
        exporter: Literal["coordinator", "rank"],
        fixed: Mapping[str, str],
        *,
        make_gauge: MakeGauge | None,
    ) -> None:
        """Creates every gauge of the exporter; sets counters to 0 where all labels are known.

        Without `make_gauge` nothing is exported.

        Args:
            fixed: Labels with the same value in all of its series (run, rank).
        """
        self._fixed = {name: value if len(value) <= 100 else OTHER for name, value in fixed.items()}
        self._gauges: dict[str, Any] = {}
        self._values: dict[tuple[str, Labels], tuple[float, dict[str, str]]] = {}
        self._totals: dict[tuple[str, Labels], float] = {}
        self._seen: dict[str, set[str]] = {}
        for entry in METRICS:
            if entry.exporter != exporter:
                continue
            if make_gauge is not None:
                gauge = make_gauge(entry.exported_name, entry.help, entry.labels)
                self._gauges[entry.column] = gauge
            if entry.kind == "counter":
                known = [label(name).values for name in self._free(entry)]
                for labels in product(*known):
                    self.add(entry.column, 0.0, labels)

    def set(self, column: str, value: float, labels: Labels = ()) -> None:
        """Sets a gauge for the next `flush`.

        Raises:
            KeyError: If the table has no such column.
        """
        self._note(metric(column), float(value), labels)

    def add(self, column: str, amount: float, labels: Labels = ()) -> None:
        """Adds to a counter; negative amounts are ignored."""
        entry = metric(column)
        labels = self._admitted(entry, labels)
        total = self._totals.get((column, labels), 0.0) + max(0.0, amount)
        self._totals[column, labels] = total
        self._note(entry, total, labels)

    def raise_to(self, column: str, total: float, labels: Labels = ()) -> None:
        """Sets the running total of a counter; it never falls."""
        admitted = self._admitted(metric(column), labels)
        self.add(column, total - self._totals.get((column, admitted), 0.0), labels)

    def update(self, values: Values, *, totals: bool) -> None:
        """Sets values by column and labels; counters are totals, or growth since the last call."""
        for column, by_label in values.items():
            counter = metric(column).kind == "counter"
            for labels, value in by_label.items():
                if not counter:
                    self.set(column, value, labels)
                elif totals:
                    self.raise_to(column, value, labels)
                else:
                    self.add(column, value, labels)

    def flush(self) -> None:
        """Hands every value to Ray, which drops what is not set again before its next report."""
        for (column, _), (value, tags) in list(self._values.items()):
            if column in self._gauges:
                self._gauges[column].set(value, tags)

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


class RunTelemetry:
    """The coordinator's exporter: what is true of the whole run."""

    def __init__(self, options: TelemetryOptions | None, make_gauge: MakeGauge) -> None:
        """Reports the state `starting`; without options it exports and logs nothing, ever."""
        self.exports = options is not None and options.exports
        if options is not None:
            begin_log(LogContext(options.run, step=lambda: self._row.get("step")), options.log)
        options = options or TelemetryOptions("", 0, 0)
        self._series = Series(
            "coordinator",
            {"run": options.run},
            make_gauge=make_gauge if self.exports else None,
        )
        self._row: Mapping[str, Any] = {}
        self._flushing = threading.RLock()
        self._samples: int | None = None
        self._series.set("min_workers", options.min_workers)
        self._series.set("max_workers", options.max_workers)
        self.state("starting")
        if self.exports:
            threading.Thread(target=self._repeat, name="telemetry", daemon=True).start()

    def state(self, now: str, reason: str = "") -> None:
        """The run's state: 1 for this one, 0 for every other one."""
        log_of("run").info(f"{now}: {reason}" if reason else now, extra={"fields": {"state": now}})
        for state in label("state").values:
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
        self._set_columns(row)
        if (found := main_value(row)) is not None:
            self._series.set("eval_metric", found[2])
        if "loss" in row:
            # The row of a step in which nothing was attacked has no such column.
            self._series.set("adversarial_fraction", row.get("adversarial_fraction", 0.0))

    def measured(self, values: Values) -> None:
        """Measurements of rank 0 since the last call."""
        self._series.update(values, totals=False)

    def set(self, column: str, value: float) -> None:
        """A gauge of the run that no row has."""
        self._series.set(column, value)

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

    def rank_failed(self, kind: str) -> None:
        """A rank ended with an error of this class."""
        if kind == CommunicationError.__name__:
            self._series.add("communication_errors", 1)

    def flush(self) -> None:
        """Exports everything, the newest step included, now."""
        with self._flushing:
            self._set_columns(self._row)
            samples = int(self._row.get("samples", 0))
            if self._samples is not None and samples > self._samples:
                # Steps that are computed again are not counted again.
                self._series.add("samples", samples - self._samples)
                self._samples = samples
            self._series.flush()

    def _set_columns(self, row: Mapping[str, Any]) -> None:
        for column in _OF_ROWS:
            if row.get(column) is not None:
                self._series.set(column, row[column])

    def _log_event(self, kind: str, row: Mapping[str, Any]) -> None:
        log = log_of("resizes" if kind in _OF_RESIZES else "run")
        fields = {name: value for name, value in row.items() if name not in _LOGGED_ELSEWHERE}
        log.log(
            logging.WARNING if kind in _ALARMING else logging.INFO,
            f"{kind}: {row['reason']}" if row.get("reason") else kind,
            extra={"fields": {"event": kind, "step": row.get("step"), **fields}},
        )

    def _repeat(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            self.flush()


class RankTelemetry:
    """A rank's exporter."""

    def __init__(
        self,
        options: TelemetryOptions,
        rank: int,
        make_gauge: MakeGauge,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Creates the gauges.

        Args:
            rank: Number of this rank; from the label's bound on, ranks share a series.
            clock: Monotonic time in s.
        """
        self._clock = clock
        self._exported_at = clock()
        bounded = str(rank) if rank < label("rank").most else OTHER
        self._series = Series("rank", {"run": options.run, "rank": bounded}, make_gauge=make_gauge)

    @property
    def is_due(self) -> bool:
        """Whether the last export is more than `INTERVAL_S` ago."""
        return self._clock() - self._exported_at >= INTERVAL_S

    def export(self, values: Values) -> None:
        """Exports running totals and gauges now."""
        self._exported_at = self._clock()
        self._series.update(values, totals=True)
        self._series.flush()
