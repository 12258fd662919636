"""A study as one resumable call: cells as Ray tasks, a few at a time.

Everything that a study keeps lies below its folder: `cells/<method>-B<batch>-s<seed>/` are run folders,
and the tables, the CSV files and the page are made from their results after every cell.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.ray.nodes import start_actor
from elastic_kfac.cluster.run.progress import Display, ProgressLine
from elastic_kfac.cluster.run.result import EXIT_INTERRUPTED
from elastic_kfac.config.tracking import TrackingConfig
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import UsageError
from elastic_kfac.experiments.engine import Engine, session
from elastic_kfac.experiments.study import COLUMNS, Cell, LoadedStudy
from elastic_kfac.experiments.study_cell import (
    CellTask,
    StudyBoard,
    cell_function,
    missing_measures,
)
from elastic_kfac.experiments.study_outcome import (
    Outcome,
    cells_csv,
    summary_csv,
    take_result,
    to_json,
    trial_of_cell,
)
from elastic_kfac.experiments.trials import FAILED, FINISHED, RUNNING, WAITING, Trial, TrialTable
from elastic_kfac.runs.tracking import TrackedTrial, tracked_trials
from elastic_kfac.state.claim import claimed
from elastic_kfac.state.run_folder import RunFolder

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


def compare(
    loaded: LoadedStudy,
    *,
    name: str,
    render: Callable[[Outcome], str],
    storage: str = "./runs",
    address: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    display: Display | None = None,
    cluster: LocalCluster | None = None,
) -> StudyResult:
    """Trains what has no result yet and writes the study's files; the same `name` continues.

    Args:
        name: Its folder is `<storage>/<name>`.
        address: Address of a Ray cluster; None starts one on this machine with room for
            `parallelism` cells.
        provenance: Versions and hardware, for `comparison.json`.
        cluster: An embedded cluster that this process is connected to.

    Raises:
        UsageError: If a finished cell was trained with another configuration, or there is no
            cluster at the address.
    """
    trained: tuple[str, ...] = ()
    interrupted = None
    with contextlib.ExitStack() as stack:
        line = display or ProgressLine(plain_interval_s=10.0)
        stack.callback(line.close)
        place = Storage(f"{storage.rstrip('/')}/{name}")
        stack.enter_context(claimed(place, f"study {name}", say=line.say))
        folder = _StudyFolder(loaded, name, place, provenance or {})
        waiting = folder.open_cells()
        if len(waiting) < len(loaded.cells):
            done = len(loaded.cells) - len(waiting)
            line.say(f"{folder.storage.uri}: {done} of {len(loaded.cells)} cells are done.")
        if waiting:
            stack.enter_context(folder.tracking(waiting[0].config.tracking))
            slots = loaded.study.parallelism
            signals = stack.enter_context(
                session(
                    line,
                    loaded.cells[0].config,
                    nodes=1,
                    workers_per_node=min(slots, len(loaded.cells)),
                    address=address,
                    cluster=cluster,
                )
            )
            engine = Engine(
                folder.trials, line, signals, lambda: folder.write_page(render), slots=slots
            )
            executor = stack.enter_context(_TaskExecutor(folder, waiting, engine))
            engine.run(executor)
            trained, interrupted = tuple(executor.trained), signals.reason
            if interrupted is not None:
                left = folder.trials.count(WAITING)
                line.say(
                    f"{interrupted}: stopped with {left} cells to go; the same command continues."
                )
        folder.write()
        folder.write_page(render)
    return StudyResult(folder.outcome(), folder.storage.uri, trained, interrupted)


class _StudyFolder:
    """The trial table of a study, and the files that hold it."""

    def __init__(
        self, loaded: LoadedStudy, name: str, storage: Storage, provenance: Mapping[str, Any]
    ) -> None:
        """Reads the results of earlier calls.

        Raises:
            UsageError: If a finished cell was trained with another configuration.
        """
        self.study = loaded.study
        self.storage = storage
        self.trials = TrialTable()
        self._name = name
        self._cells = loaded.cells
        self._provenance = dict(provenance)
        self._results = {cell.name: self._earlier_result(cell) for cell in loaded.cells}
        for cell in loaded.cells:
            self.trials.add(self.before(cell))

    def open_cells(self) -> list[Cell]:
        """Cells to train or to measure."""
        found = []
        for cell in self._cells:
            result = self._results[cell.name]
            if result is None or (
                result["status"] == FINISHED and missing_measures(result, self.task(cell))
            ):
                found.append(cell)
        return found

    def task(self, cell: Cell) -> CellTask:
        """The work on a cell."""
        columns = self.study.wanted_columns()
        return CellTask(
            name=cell.name,
            uri=self._folder_of(cell).uri,
            config=cell.config,
            columns=tuple(name for name in columns if COLUMNS[name].needs == "state"),
            measures=self.study.measure,
        )

    def outcome(self) -> Outcome:
        """The study as it is now; a running cell counts by its earlier result, mostly as waiting."""
        trials = TrialTable(self.trials)
        for cell in self._cells:
            if trials[cell.name].status == RUNNING:
                trials[cell.name] = self.before(cell)
        return Outcome(self._name, self.study, trials)

    def tracking(self, tracking: TrackingConfig) -> AbstractContextManager[None]:
        """Sends the cells' metrics to trackers, within the block."""
        return tracked_trials(tracking, self.storage.uri, self._name, self._tracked)

    def _tracked(self) -> list[TrackedTrial]:
        """The cells, as trackers see them."""
        return [
            TrackedTrial(
                cell.name,
                self._folder_of(cell).uri,
                partial(getattr, cell, "config"),
                {WAITING: None, RUNNING: ""}.get(
                    self.trials[cell.name].status, self.trials[cell.name].status
                ),
            )
            for cell in self._cells
        ]

    def before(self, cell: Cell) -> Trial:
        """A cell as earlier calls left it."""
        return trial_of_cell(cell, self._results[cell.name])

    def write(self) -> None:
        """Replaces the tables."""
        outcome = self.outcome()
        values = {**to_json(outcome), "provenance": self._provenance}
        self.storage.write("comparison.json", (json.dumps(values, indent=1) + "\n").encode())
        self.storage.write("cells.csv", cells_csv(outcome).encode())
        self.storage.write("summary.csv", summary_csv(outcome).encode())

    def write_page(self, render: Callable[[Outcome], str]) -> None:
        """Replaces the report."""
        self.storage.write("report.html", render(self.outcome()).encode())

    def _folder_of(self, cell: Cell) -> RunFolder:
        return RunFolder(f"{self.storage.uri.rstrip('/')}/{CELLS_FOLDER}/{cell.name}")

    def _earlier_result(self, cell: Cell) -> Mapping[str, Any] | None:
        folder = self._folder_of(cell)
        if not folder.storage.exists("config.yaml"):
            return None
        # Where metrics go as well changes no cell.
        if (
            folder.read_config().model_copy(update={"tracking": cell.config.tracking})
            != cell.config
        ):
            raise UsageError(
                f"cell {cell} of study {self._name} was trained with another configuration",
                given=f"{folder.uri}/config.yaml differs in {_difference(folder, cell)}",
                change="give the changed study another --name, or delete the cell's folder",
            )
        return folder.result()


class _TaskExecutor:
    """Runs cells as Ray tasks, `parallelism` at a time; a context manager that cancels what is left."""

    def __init__(self, folder: _StudyFolder, cells: list[Cell], engine: Engine) -> None:
        self.trained: list[str] = []
        self._folder = folder
        self._engine = engine
        self._queue = list(reversed(cells))
        self._running: dict[Any, Cell] = {}
        self._board = start_actor(StudyBoard)

    def __enter__(self) -> _TaskExecutor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop("")
        ray.kill(self._board)

    def poll(self) -> bool:
        trials = self._folder.trials
        while self._queue and len(self._running) < self._folder.study.parallelism:
            cell = self._queue.pop()
            trial = trials[cell.name]
            trial.status, trial.numbers["started"] = RUNNING, time.time()
            task = cell_function(cell.config).remote(self._folder.task(cell), self._board)
            self._running[task] = cell
        if not self._running:
            return False
        for task in ray.wait(list(self._running), num_returns=1, timeout=0.25)[0]:
            self._record(trials[self._running[task].name], self._running.pop(task), task)
        fractions: dict[str, float] = ray.get(self._board.view.remote())
        for name, fraction in fractions.items():
            trials[name].fraction = fraction
        return bool(self._queue or self._running)

    def stop(self, reason: str) -> None:
        # A cell continues from its last snapshot; saving its state is not worth the wait.
        for task, cell in self._running.items():
            ray.cancel(task, force=True)
            self._folder.trials[cell.name] = self._folder.before(cell)
        self._running, self._queue = {}, []

    def _record(self, trial: Trial, cell: Cell, task: Any) -> None:
        try:
            result: dict[str, Any] = ray.get(task)
        except ray.exceptions.RayError as error:
            text = str(getattr(error, "cause", None) or error).strip().splitlines()
            line = f"{type(error).__name__}: {text[0] if text else ''}"
            result = {"status": FAILED, "error": line}
        take_result(trial, result)
        if trial.status == FINISHED:
            self.trained.append(trial.id)
        else:
            self._engine.line.say(f"{cell} {trial.status}: {trial.reason}")
        try:
            self._folder.write()
        except OSError as error:
            # The end writes the tables again, and does not let it pass.
            self._engine.line.say(f"warning: the study's tables cannot be written: {error}")
        self._engine.has_news = True


def _difference(folder: RunFolder, cell: Cell) -> str:
    ours, theirs = cell.config.model_dump(), folder.read_config().model_dump()
    return next(
        f"{section}.{key}"
        for section, values in ours.items()
        for key in values
        if values[key] != theirs[section][key]
    )
