"""What the folder of a search says: its trials, its points with their repeats, who won.

The folder is written by a search that may still be going, may have been killed, or may have failed in
every trial; all of this module works on what there is. `cluster/tuning.py` describes the files.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from elastic_kfac.errors import UsageError
from elastic_kfac.runs.history import number

EXPERIMENT = "experiment.json"
ENDED = ("finished", "stopped", "failed", "refused")
"""States of trials that a search does not run again."""
TRIED = ("finished", "stopped")
"""States of trials whose outcome says something about their configuration."""
BEST = "best"

NUMBERS = (
    "objective",
    "train_time_to_accuracy_s",
    "time_to_accuracy_s",
    "steps",
    "train_time_s",
    "worker_seconds",
    "cpu_seconds",
    "best_accuracy",
    "peak_memory_bytes",
    "started",
    "ended",
)
"""Columns of `trials.csv` that hold a number, or nothing where it is not known."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run."""

    step: float
    seconds: float
    """Training seconds where the run recorded them, else wall-clock seconds."""
    accuracy: float


@dataclass(frozen=True)
class Change:
    """The group of workers of a trial changed."""

    time: float
    before: int
    after: int


@dataclass(frozen=True)
class Trial:
    """One row of `trials.csv`, with what its run folder adds."""

    index: int
    """Position among all trials; names the trial in the page."""
    id: str
    stage: str
    point: str
    status: str
    reason: str
    seed: str
    parameters: Mapping[str, Any]
    reached: bool
    numbers: Mapping[str, float]
    run_folder: str = ""
    parent: str = ""
    evaluations: Sequence[Evaluation] = ()
    changes: Sequence[Change] = ()

    @property
    def value(self) -> float | None:
        """The objective; None for a trial that did not reach the target (censored)."""
        return self.numbers.get("objective") if self.reached else None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True)
class Point:
    """One configuration with all its repeats; the median repeat stands for it."""

    name: str
    trials: Sequence[Trial]
    order: Sequence[int]
    """Indices of `trials`, the best first."""

    @property
    def representative(self) -> Trial:
        """The median repeat; of an even number the worse of the two in the middle."""
        return self.trials[self.order[len(self.order) // 2]]

    @property
    def value(self) -> float | None:
        """Objective of the median repeat; None when that one is censored."""
        return self.representative.value

    @property
    def values(self) -> list[float]:
        """Objectives of the repeats that reached the target, ascending."""
        return sorted(value for trial in self.trials if (value := trial.value) is not None)

    @property
    def ended(self) -> bool:
        """Whether every repeat has ended."""
        return all(trial.ended for trial in self.trials)

    @property
    def tried(self) -> bool:
        """Whether its outcome says something about the configuration."""
        return self.ended and any(trial.status in TRIED for trial in self.trials)

    @property
    def parameters(self) -> Mapping[str, Any]:
        return self.trials[0].parameters

    def median(self, column: str) -> float | None:
        """Median of a column over the repeats that have it."""
        found = [trial.numbers[column] for trial in self.trials if column in trial.numbers]
        return statistics.median(found) if found else None


@dataclass(frozen=True)
class Experiment:
    """A whole search, read once."""

    location: str
    about: Mapping[str, Any]
    trials: Sequence[Trial]
    parameters: Sequence[str]
    csv: str = ""
    best_config: str | None = None
    folder: Path = field(default=Path())

    @property
    def name(self) -> str:
        return str(self.about.get("name") or self.folder.name or "experiment")

    @property
    def status(self) -> str:
        """`running`, `finished`, `interrupted` or `failed`."""
        return str(self.about.get("status", "running"))

    @property
    def target(self) -> float | None:
        """The accuracy that a trial is to reach."""
        return number(self.about, "target_accuracy")

    @property
    def metric(self) -> str:
        """Name of what is minimised."""
        given = self.about.get("objective")
        if isinstance(given, Mapping):
            return str(given.get("metric", "objective"))
        return str(given or "train_time_to_accuracy_s")

    @property
    def unit(self) -> str:
        """Unit of the objective, for people."""
        given = self.about.get("objective")
        if isinstance(given, Mapping) and given.get("unit"):
            return str(given["unit"])
        return "seconds"

    @property
    def space(self) -> Mapping[str, Any]:
        """The resolved search space."""
        return mapping(self.about.get("space"))

    @property
    def repeats(self) -> int:
        """Seeds per point."""
        return max(1, int(number(self.about, "n_repeats") or 1))

    @cached_property
    def points(self) -> list[Point]:
        """Every searched configuration: the best first, then what is not decided yet."""
        found = self._points("search")
        return sorted(found, key=lambda p: (not p.tried, p.ended, self.score(p.representative)))

    @cached_property
    def references(self) -> dict[str, Point]:
        """Configurations that the search is compared with, by name."""
        return {point.name: point for point in self._points("reference")}

    @cached_property
    def confirmed(self) -> dict[str, Point]:
        """The winner (`best`) and the references once more, with seeds that the search never saw."""
        return {
            point.name.removeprefix("confirm-"): point
            for point in self._points("confirm")
            if point.ended
        }

    @cached_property
    def best(self) -> Point | None:
        """The point that the search chose; None while there is none."""
        chosen = str(self.about.get("best") or "")
        for point in self.points:
            if chosen and any(trial.id == chosen for trial in point.trials):
                return point
        finished = (p for p in self.points if p.tried and p.representative.status == "finished")
        return next(finished, None)

    @property
    def done(self) -> int:
        """Trials that have ended in one way or another."""
        return sum(trial.ended for trial in self.trials)

    @property
    def total(self) -> int:
        """Trials that there will be, as far as is known."""
        if self.status == "finished":
            return len(self.trials)
        space, planned = self.space, 0
        points = number(space, "num_trials")
        if mapping(space.get("searcher")).get("name") == "grid":
            kinds = mapping(space.get("parameters")).values()
            points = math.prod(len(choices(kind) or [0]) for kind in kinds)
        if points is not None:
            references = len(mapping(space.get("references")))
            planned = (int(points) + references) * self.repeats
            planned += int(number(space, "confirm") or 0) * (1 + references)
        return max(len(self.trials), planned)

    def count(self, status: str) -> int:
        """Trials in a state."""
        return sum(trial.status == status for trial in self.trials)

    def score(self, trial: Trial) -> tuple[int, float]:
        """What trials are ordered by: who arrived by the objective, the others behind them."""
        if trial.value is not None:
            return 0, trial.value
        rule = mapping(self.space.get("objective")).get("censored", "by_distance")
        accuracy, target = trial.numbers.get("best_accuracy"), self.target
        if rule == "equal" or accuracy is None or not target:
            return 1, 1.0
        return 1, min(max((target - accuracy) / target, 0.0), 1.0)

    def _points(self, stage: str) -> list[Point]:
        groups: dict[str, list[Trial]] = {}
        for trial in self.trials:
            if trial.stage == stage:
                groups.setdefault(trial.point, []).append(trial)
        return [
            Point(name, trials, sorted(range(len(trials)), key=lambda i: self.score(trials[i])))
            for name, trials in groups.items()
        ]


def is_experiment(folder: Path) -> bool:
    """Whether a folder holds a search."""
    return (folder / EXPERIMENT).is_file()


def read_experiment(folder: Path) -> Experiment:
    """Reads the folder of a search.

    Raises:
        UsageError: If the folder is not there, holds no search, or `experiment.json` is damaged.
    """
    if not is_experiment(folder):
        raise UsageError(
            "not the folder of a search", given=folder, change=f"name one that holds {EXPERIMENT}"
        )
    problem, about = "a mapping is wanted", None
    try:
        about = json.loads((folder / EXPERIMENT).read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        problem = str(error)
    if not isinstance(about, dict):
        raise UsageError("a damaged folder of a search", given=folder / EXPERIMENT, change=problem)
    text = _text_of(folder / "trials.csv") or ""
    cells = list(csv.DictReader(io.StringIO(text)))
    named = about.get("parameters")
    columns = list(cells[0]) if cells else []
    parameters = [
        str(key)
        for key in (named if isinstance(named, list) else columns)
        if isinstance(named, list) or "." in str(key)
    ]
    trials = [_trial(index, row, parameters, folder) for index, row in enumerate(cells)]
    return Experiment(
        location=str(folder),
        about=about,
        trials=trials,
        parameters=parameters,
        csv=text,
        best_config=_text_of(folder / "best_config.yaml"),
        folder=folder,
    )


def choices(parameter: Any) -> list[Any] | None:
    """The values of a discrete parameter of a space; None for an interval."""
    given = mapping(parameter)
    found = given.get("choice") or given.get("grid")
    return list(found) if isinstance(found, list | tuple) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping as it is; anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def is_real(value: Any) -> TypeGuard[int | float]:
    """Whether a parameter's value is a number; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _trial(
    index: int, cells: Mapping[str, str | None], parameters: Sequence[str], folder: Path
) -> Trial:
    def cell(name: str) -> str:
        return str(cells.get(name) or "")

    numbers = {name: value for name in NUMBERS if (value := _finite(cell(name))) is not None}
    run = _inside(folder, cell("run_folder"))
    return Trial(
        index=index,
        id=cell("trial_id") or f"#{index}",
        stage=cell("stage") or "search",
        point=cell("point") or cell("trial_id"),
        status=cell("status") or "pending",
        reason=cell("reason"),
        seed=cell("seed"),
        parameters={name: _parsed(cell(name)) for name in parameters},
        reached=cell("reached").lower() == "true" and "objective" in numbers,
        numbers=numbers,
        run_folder=cell("run_folder"),
        parent=cell("parent"),
        evaluations=[] if run is None else list(_evaluations(run / "metrics.jsonl")),
        changes=[] if run is None else list(_changes(run / "events.jsonl")),
    )


def _inside(folder: Path, relative: str) -> Path | None:
    """A folder below the experiment's; None for one that is elsewhere or not there."""
    if not relative or "\0" in relative:
        return None
    run = (folder / relative).resolve()
    return run if run.is_relative_to(folder.resolve()) and run.is_dir() else None


def _evaluations(path: Path) -> Iterator[Evaluation]:
    # Steps are thousands of rows and evaluations a few: the others are not even parsed.
    for row in _rows(path, '"eval_accuracy"'):
        seconds = number(row, "train_time_s")
        seconds = number(row, "wall_time_s") if seconds is None else seconds
        found = (number(row, "step"), seconds, number(row, "eval_accuracy"))
        known = [value for value in found if value is not None and math.isfinite(value)]
        if len(known) == 3:
            yield Evaluation(*known)


def _changes(path: Path) -> Iterator[Change]:
    for row in _rows(path, "to_world_size"):
        time = number(row, "time")
        before, after = number(row, "from_world_size"), number(row, "to_world_size")
        if time is not None and before and after:
            yield Change(time, int(before), int(after))


def _rows(path: Path, needle: str) -> Iterable[Mapping[str, Any]]:
    for line in (_text_of(path) or "").splitlines():
        if needle not in line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
