"""The engine of searches and studies: start trials, follow them, show them, stop on a signal.

A search hands its trials to Ray Tune, a study runs its cells as Ray tasks; both are an `Executor` here.
All else is the same: the cluster they use, the trial table they fill, one live line, the page that is
written while they run, and a stop that leaves unfinished trials to the next call under the same name.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from elastic_kfac.cluster.ray.connection import connected, quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster, cluster_for, start_line
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.config import Config
from elastic_kfac.experiments.trials import (
    DIVERGED,
    FAILED,
    PENDING,
    REFUSED,
    RUNNING,
    WAITING,
    WORDS,
    Trial,
    TrialTable,
)
from elastic_kfac.runs.signals import StopSignals
from elastic_kfac.runs.summary import duration


class Executor(Protocol):
    """Runs trials; its table is up to date after every poll."""

    def poll(self) -> bool:
        """Waits a moment for news and records them; False once nothing runs and nothing is left."""
        ...

    def stop(self, reason: str) -> None:
        """Begins to end all trials; `poll` returns False when they have ended."""
        ...


@contextlib.contextmanager
def session(
    line: Display,
    config: Config,
    *,
    nodes: int,
    workers_per_node: int = 1,
    address: str | None,
    cluster: LocalCluster | None,
) -> Iterator[StopSignals]:
    """Connects this process to a cluster and turns signals into a wish to stop.

    Args:
        line: Reports that a cluster starts.
        workers_per_node: Workers that fit on such a node.
        cluster: An embedded cluster that this process is connected to already.
    """
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        stack.enter_context(quiet_driver())
        if cluster is None and address is None:
            line.say(start_line(nodes))
            started = cluster_for(config, nodes, workers_per_node=workers_per_node)
            stack.enter_context(started).connect()
        elif address is not None:
            stack.enter_context(connected(address))
        signals.defer()
        yield signals


class Engine:
    """One call of `tune` or `compare`: follows executors until they are done or a signal comes."""

    def __init__(
        self,
        table: TrialTable,
        line: Display,
        signals: StopSignals,
        write_page: Callable[[], object],
        *,
        slots: int,
    ) -> None:
        """`slots` is how many trials run at the same time; `write_page` replaces the report."""
        self.table = table
        self.line = line
        self.signals = signals
        self.has_news = False
        """Whether the table has changed since the page was written."""
        self.unplanned = 0
        """Trials that are not in the table yet."""
        self._slots = slots
        self._write_page = write_page
        self._written = 0.0

    def run(self, executor: Executor) -> None:
        """Polls until all trials have ended; a signal stops them once."""
        is_stopping = False
        while executor.poll():
            if self.signals.reason is not None and not is_stopping:
                is_stopping = True
                executor.stop(self.signals.reason)
            if self.has_news:
                self.write_page(interval_s=5.0)
            # A copy: Ray Tune's thread may add trials meanwhile.
            self.line.show(status_line(list(self.table.values()), self.unplanned, self._slots))

    def write_page(self, interval_s: float = 0.0) -> None:
        """Writes the page, unless it was written less than `interval_s` seconds ago."""
        if time.monotonic() - self._written < interval_s:
            return
        self._written, self.has_news = time.monotonic(), False
        try:
            self._write_page()
        except Exception as error:
            # Training continues; `elastic-kfac report` can be called at any time.
            self.line.say(f"the report could not be written: {type(error).__name__}: {error}")


def status_line(
    trials: Sequence[Trial], unplanned: int, slots: int, clock: Callable[[], float] = time.time
) -> str:
    """`3 of 9 trials  1 failed  training KFAC-B32-s0 45%  about 2 min 10 s left`."""
    running = [trial for trial in trials if trial.status == RUNNING]
    waiting = [trial for trial in trials if trial.status in (PENDING, WAITING)]
    total = len(trials) + unplanned
    parts = [f"{total - len(running) - len(waiting) - unplanned} of {total} trials"]
    for status in (DIVERGED, FAILED, REFUSED):
        if count := sum(trial.status == status for trial in trials):
            parts.append(f"{count} {WORDS.get(status, status)}")
    if running:
        parts.append("training " + ", ".join(f"{t.id} {t.fraction:.0%}" for t in running))
    left = _seconds_left(trials, running, waiting, unplanned, clock())
    if left is not None:
        together = min(slots, max(1, len(running) + len(waiting) + unplanned))
        parts.append(f"about {duration(left / together)} left")
    return "  ".join(parts)


def _seconds_left(
    trials: Sequence[Trial],
    running: Sequence[Trial],
    waiting: Sequence[Trial],
    unplanned: int,
    now: float,
) -> float | None:
    """Seconds of training left, one trial after another; None while nothing is known.

    A trial takes as long as others of its point, else as long as all.
    """
    known: dict[str, list[float]] = {}
    for trial in trials:
        seconds = trial.numbers.get("train_time_s", trial.numbers.get("time_s"))
        if trial.status not in (RUNNING, PENDING, WAITING) and seconds:
            known.setdefault(trial.point, []).append(seconds)
    for trial in running:
        if trial.fraction > 0.02 and trial.point not in known:
            known[trial.point] = [
                max(0.0, now - trial.numbers.get("started", now)) / trial.fraction
            ]
    if not known:
        return None
    means = {point: sum(some) / len(some) for point, some in known.items()}
    usual = sum(means.values()) / len(means)
    return (
        sum(means.get(t.point, usual) * (1 - t.fraction) for t in running)
        + sum(means.get(t.point, usual) for t in waiting)
        + usual * unplanned
    )
