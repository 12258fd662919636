"""A study as one resumable Ray job: cells as tasks, a few at a time, one live line.

Everything that a study knows lies below its folder: `cells/<method>-B<batch>-s<seed>/` are run folders,
and the tables, the CSV files and the page are made from their results after every cell.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.live import Live
from rich.text import Text

from elastic_kfac.cluster.ray.connection import StopSignals, connected, quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster, cluster_for
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import UsageError
from elastic_kfac.experiments.study import COLUMNS, Cell, LoadedStudy
from elastic_kfac.experiments.study_cell import (
    CellTask,
    StudyBoard,
    cell_function,
    missing_measures,
)
from elastic_kfac.experiments.study_outcome import (
    DIVERGED,
    FAILED,
    FINISHED,
    CellResult,
    Outcome,
    cells_csv,
    summary_csv,
    to_json,
)
from elastic_kfac.runs.final_state import FinalMeasures
from elastic_kfac.runs.summary import duration
from elastic_kfac.state.run_folder import RunFolder

EXIT_INTERRUPTED = 130
CELLS_FOLDER = "cells"


@dataclass(frozen=True)
class StudyResult:
    """How a call of `compare` ended."""

    outcome: Outcome
    uri: str
    """The study's folder."""
    trained: tuple[str, ...]
    """Cells that this call trained to their end."""
    interrupted: str | None = None
    """The signal that stopped it."""

    @property
    def exit_code(self) -> int:
        """0 when every cell has a result (claims may fail), 1 when one failed, 130 after a signal."""
        if self.interrupted is not None:
            return EXIT_INTERRUPTED
        return 1 if self.outcome.count(FAILED) else 0


class StudyLine:
    """One live line on a terminal; elsewhere a plain line every `plain_interval_s` seconds."""

    def __init__(self, stream: TextIO | None = None, *, plain_interval_s: float = 10.0) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._plain_interval_s = plain_interval_s
        self._shown_at = time.monotonic()
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(Text(line))

    def show(self, line: str) -> None:
        """The state now."""
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - self._shown_at >= self._plain_interval_s:
            self._shown_at = time.monotonic()
            self.say(line)

    def close(self) -> None:
        """Takes the live line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def compare(
    loaded: LoadedStudy,
    *,
    name: str,
    storage: str = "./runs",
    address: str | None = None,
    render: Callable[[Outcome], str],
    provenance: Mapping[str, Any] | None = None,
    display: StudyLine | None = None,
    cluster: LocalCluster | None = None,
) -> StudyResult:
    """Trains what has no result yet and writes the study's files; the same `name` continues.

    Args:
        loaded: The study.
        name: Its folder is `<storage>/<name>`.
        storage: Folder or URI that every node of the cluster reaches.
        address: Address of a Ray cluster; None starts one on this machine with room for
            `parallelism` cells.
        render: Makes the page of the study.
        provenance: Versions and hardware, for `comparison.json`.
        display: Where progress is shown; None is standard output.
        cluster: An embedded cluster that this process is connected to.

    Raises:
        UsageError: If a finished cell was trained with another configuration, or there is no
            cluster at the address.
    """
    line = display or StudyLine()
    folder = Storage(f"{storage.rstrip('/')}/{name}")
    runner = _Runner(loaded, name, folder, render, dict(provenance or {}), line)
    with contextlib.ExitStack() as stack:
        stack.callback(line.close)
        if runner.waiting:
            signals = stack.enter_context(StopSignals())
            stack.enter_context(quiet_driver())
            if cluster is None and address is None:
                line.say("Starting a local Ray cluster …")
                cluster = stack.enter_context(_local_cluster(loaded))
                cluster.connect()
            elif address is not None:
                stack.enter_context(connected(address))
            signals.defer()
            runner.run(signals)
        return runner.finish()


@dataclass
class _Running:
    cell: Cell
    since: float = field(default_factory=time.monotonic)


class _Runner:
    """One call of `compare`."""

    def __init__(
        self,
        loaded: LoadedStudy,
        name: str,
        folder: Storage,
        render: Callable[[Outcome], str],
        provenance: dict[str, Any],
        line: StudyLine,
    ) -> None:
        self._study, self._name, self._folder = loaded.study, name, folder
        self._render, self._provenance, self._line = render, provenance, line
        self._cells = loaded.cells
        self._results: dict[str, Mapping[str, Any] | None] = {}
        self._trained: list[str] = []
        self._interrupted: str | None = None
        wanted = self._study.wanted_columns()
        measured = tuple(n for n in wanted if COLUMNS[n].needs == "state")
        self._tasks = {
            cell.name: CellTask(
                name=cell.name,
                uri=self._folder_of(cell).uri,
                config=cell.config,
                columns=measured,
                measures=FinalMeasures(**self._study.measure.model_dump()),
            )
            for cell in self._cells
        }
        self.waiting: list[Cell] = []
        """Cells to train or to measure."""
        for cell in self._cells:
            result = self._earlier_result(cell)
            self._results[cell.name] = result
            if result is None or (
                result["status"] == FINISHED and missing_measures(result, self._tasks[cell.name])
            ):
                self.waiting.append(cell)
        self._pace = _Pace(self._results)
        kept = len(self._cells) - len(self.waiting)
        if kept:
            line.say(f"{self._folder.uri}: {kept} of {len(self._cells)} cells are done.")

    def run(self, signals: StopSignals) -> None:
        """Runs the waiting cells until all have ended or a signal comes."""
        board = _start_board()
        queue = list(reversed(self.waiting))
        running: dict[Any, _Running] = {}
        try:
            while (queue or running) and signals.reason is None:
                while queue and len(running) < self._study.parallelism:
                    cell = queue.pop()
                    task = self._tasks[cell.name]
                    running[cell_function(cell.config).remote(task, board)] = _Running(cell)
                for reference in ray.wait(list(running), num_returns=1, timeout=0.25)[0]:
                    self._note(running.pop(reference), reference)
                fractions = ray.get(board.view.remote())
                self._line.show(self._status(queue, list(running.values()), fractions))
        finally:
            # A cell goes on from its last snapshot; parking it would not be worth the wait.
            for reference in running:
                ray.cancel(reference, force=True)
            ray.kill(board)
        if signals.reason is not None:
            self._interrupted = signals.reason
            self._line.say(
                f"{signals.reason}: stopped with {len(queue) + len(running)} cells to go; the same "
                "command continues."
            )

    def finish(self) -> StudyResult:
        """Writes the files of the study as it is now."""
        outcome = self._write()
        return StudyResult(outcome, self._folder.uri, tuple(self._trained), self._interrupted)

    # ---- inside ----------------------------------------------------------------------------

    def _folder_of(self, cell: Cell) -> RunFolder:
        return RunFolder(f"{self._folder.uri.rstrip('/')}/{CELLS_FOLDER}/{cell.name}")

    def _earlier_result(self, cell: Cell) -> Mapping[str, Any] | None:
        folder = self._folder_of(cell)
        if not folder.storage.exists("config.yaml"):
            return None
        if folder.read_config() != cell.config:
            raise UsageError(
                f"cell {cell} of study {self._name} was trained with another configuration",
                given=f"{folder.uri}/config.yaml differs in {_difference(folder, cell)}",
                change="give the changed study another --name, or delete the cell's folder",
            )
        return folder.result()

    def _note(self, ended: _Running, reference: Any) -> None:
        cell = ended.cell
        try:
            result: dict[str, Any] = ray.get(reference)
        except ray.exceptions.RayError as error:
            text = str(getattr(error, "cause", None) or error).strip().splitlines()
            line = f"{type(error).__name__}: {text[0] if text else ''}"
            result = {"status": FAILED, "error": line}
        self._results[cell.name] = result
        status = result["status"]
        if status == FINISHED:
            self._trained.append(cell.name)
            self._pace.note(cell, time.monotonic() - ended.since)
        else:
            self._line.say(f"{cell} {status}: {result.get('error')}")
        self._write()

    def _write(self) -> Outcome:
        outcome = Outcome(
            self._name,
            self._study,
            [CellResult.of(c.place, c.seed, self._results[c.name]) for c in self._cells],
        )
        values = {**to_json(outcome), "provenance": self._provenance}
        self._folder.write("comparison.json", (json.dumps(values, indent=1) + "\n").encode())
        self._folder.write("cells.csv", cells_csv(outcome).encode())
        self._folder.write("summary.csv", summary_csv(outcome).encode())
        self._folder.write("report.html", self._render(outcome).encode())
        return outcome

    def _status(
        self, queue: Sequence[Cell], running: Sequence[_Running], fractions: Mapping[str, float]
    ) -> str:
        ended = [result["status"] for result in self._results.values() if result is not None]
        parts = [f"{len(self._cells) - len(queue) - len(running)} of {len(self._cells)} cells"]
        parts += [f"{n} {word}" for word in (DIVERGED, FAILED) if (n := ended.count(word))]
        now = [f"{r.cell} {fractions.get(r.cell.name, 0.0):.0%}" for r in running]
        if now:
            parts.append("training " + ", ".join(now))
        left = self._pace.seconds_left(queue, running, fractions, self._study.parallelism)
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return "  ".join(parts)


class _Pace:
    """How long cells take: like those of the same method and batch size, else like all."""

    def __init__(self, results: Mapping[str, Mapping[str, Any] | None]) -> None:
        self._seconds: dict[str, list[float]] = {}
        for name, result in results.items():
            if result is not None and result.get("train_time_s"):
                self._seconds.setdefault(_kind(name), []).append(float(result["train_time_s"]))

    def note(self, cell: Cell, seconds: float) -> None:
        """A cell has taken so long."""
        self._seconds.setdefault(_kind(cell.name), []).append(seconds)

    def seconds_left(
        self,
        queue: Sequence[Cell],
        running: Sequence[_Running],
        fractions: Mapping[str, float],
        parallelism: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> float | None:
        """An estimate from what is known; None while nothing is."""
        known = {kind: sum(some) / len(some) for kind, some in self._seconds.items()}
        rest, now = 0.0, clock()
        for one in running:
            fraction = fractions.get(one.cell.name, 0.0)
            if fraction > 0.02:
                known.setdefault(_kind(one.cell.name), (now - one.since) / fraction)
        if not known:
            return None
        mean = sum(known.values()) / len(known)
        for one in running:
            left = 1 - fractions.get(one.cell.name, 0.0)
            rest += known.get(_kind(one.cell.name), mean) * left
        rest += sum(known.get(_kind(cell.name), mean) for cell in queue)
        return rest / min(parallelism, max(1, len(queue) + len(running)))


def _kind(name: str) -> str:
    return name.rpartition("-s")[0]


def _difference(folder: RunFolder, cell: Cell) -> str:
    ours, theirs = cell.config.model_dump(), folder.read_config().model_dump()
    return next(
        f"{section}.{key}"
        for section, values in ours.items()
        for key in values
        if values[key] != theirs[section][key]
    )


def _start_board() -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(StudyBoard).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote()


def _local_cluster(loaded: LoadedStudy) -> LocalCluster:
    """One node with room for as many cells as may run at once."""
    at_once = min(loaded.study.parallelism, len(loaded.cells))
    return cluster_for(loaded.cells[0].config, 1, workers_per_node=at_once)
