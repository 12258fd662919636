"""Trials of searches and studies: what was tried, how it ended, and how trials compare.

A trial that misses the target is censored: it would have taken longer than its budget, by an unknown
amount. It never gets a made-up time; it ranks behind every trial that reached the target, by the
accuracy it lacks.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

from elastic_kfac.json_text import parsed
from elastic_kfac.observability.quality import Direction

PENDING: Final = "pending"
RUNNING: Final = "running"
FINISHED: Final = "finished"
STOPPED: Final = "stopped"
FAILED: Final = "failed"
REFUSED: Final = "refused"
DIVERGED: Final = "diverged"
"""Training met a loss or a matrix that is not finite: a result, which a study does not try again."""
SHARED: Final = "shared"
"""Another trial, its `parent`, has the same training."""
PRUNED: Final = "pruned"
"""A finished trial has beaten it already, whatever it would still do."""
WAITING: Final = "waiting"
"""A cell of a study that has not been trained yet."""

WORDS = {REFUSED: "rejected"}
"""States that people read under another name than the files have."""

ENDED = (FINISHED, STOPPED, FAILED, REFUSED, SHARED, PRUNED)
"""States of trials that a search does not run again."""
TRIED = (FINISHED, STOPPED)
"""States of trials whose outcome depends on their configuration."""

NUMBERS = (
    "objective",
    "train_time_to_accuracy_s",
    "time_to_accuracy_s",
    "steps",
    "train_time_s",
    "worker_seconds",
    "cpu_seconds",
    "best_value",
    "peak_memory_bytes",
    "model_memory_bytes",
    "started",
    "ended",
)
"""Columns of `trials.csv` that hold a number, or nothing where it is unknown."""
_BEFORE: Final = {"best_value": "best_accuracy"}
"""Their names in earlier versions."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a trial's run."""

    step: float
    seconds: float
    """Training seconds where the run recorded them, else wall-clock seconds."""
    value: float
    """Of the metric of the target."""


@dataclass(frozen=True)
class Resize:
    """A change of a trial's group of workers."""

    time: float
    before: int
    after: int


@dataclass
class Trial:
    """One training of a search or a study."""

    id: str
    point: str
    """Number of a searched point, name of a reference, or `method@batch size` of a study."""
    seed: int
    stage: str = "search"
    """`reference`, `search` or `confirm`; `study` for a study."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    status: str = PENDING
    reason: str = ""
    reached: bool | None = None
    """Whether it reached the target; None while that is unknown."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Measured values by column."""
    run_folder: str = ""
    parent: str = ""
    """The trial whose state a PB2 clone continued from, or whose training this one shares."""
    index: int = field(default=0, compare=False)
    """Position in the table."""
    fraction: float = field(default=0.0, compare=False)
    """Share of its budget that a running trial has used."""
    evaluations: Sequence[Evaluation] = field(default=(), compare=False)
    resizes: Sequence[Resize] = field(default=(), compare=False)

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def value(self) -> float | None:
        """The objective; None for a censored trial."""
        return self.numbers.get("objective") if self.reached else None

    def note(self, values: Mapping[str, Any], *names: str) -> None:
        """Takes over those of the named values that are known."""
        for name in names:
            if values.get(name) is not None:
                self.numbers[name] = float(values[name])


@dataclass(frozen=True)
class Scoring:
    """The order of trials."""

    target: float | None
    """Value to reach."""
    censored: str = "by_distance"
    """How trials that miss the target rank: by the share of it that they lack, or all `equal`."""
    direction: Direction = "max"
    """Whether larger or smaller values are better."""

    def rank(self, trial: Trial) -> tuple[int, float]:
        """A sort key, smaller is better: (0, objective), or (1, share of the target it lacks)."""
        if trial.value is not None:
            return 0, trial.value
        best = trial.numbers.get("best_value")
        if self.censored == "equal" or best is None or not self.target:
            return 1, 1.0
        lacks = self.target - best if self.direction == "max" else best - self.target
        return 1, min(max(lacks / abs(self.target), 0.0), 1.0)

    def score(self, trial: Trial) -> float:
        """The rank as one number for searchers: v / (1 + v) below 1, censored trials from 1 to 2."""
        is_censored, amount = self.rank(trial)
        if is_censored:
            return 1.0 + amount
        return max(amount, 0.0) / (1.0 + max(amount, 0.0))

    def median(self, trials: Sequence[Trial]) -> Trial:
        """The median trial; of an even number the worse of the two in the middle."""
        return sorted(trials, key=self.rank)[len(trials) // 2]


@dataclass(frozen=True)
class Point:
    """One configuration with all its seeds; the median seed represents it."""

    name: str
    trials: Sequence[Trial]
    scoring: Scoring

    @property
    def representative(self) -> Trial:
        """The median seed."""
        return self.scoring.median(self.trials)

    @property
    def value(self) -> float | None:
        """Objective of the median seed; None when that one is censored."""
        return self.representative.value

    @property
    def values(self) -> list[float]:
        """Objectives of the seeds that reached the target, ascending."""
        return sorted(value for trial in self.trials if (value := trial.value) is not None)

    @property
    def rank(self) -> tuple[int, float]:
        return self.scoring.rank(self.representative)

    @property
    def ended(self) -> bool:
        """Whether every seed has ended."""
        return all(trial.ended for trial in self.trials)

    @property
    def tried(self) -> bool:
        """Whether it has ended with an outcome that depends on its configuration."""
        return self.ended and any(trial.status in TRIED for trial in self.trials)

    @property
    def parameters(self) -> Mapping[str, Any]:
        return self.trials[0].parameters

    def median(self, column: str) -> float | None:
        """Median of a column over the seeds that have it."""
        found = [trial.numbers[column] for trial in self.trials if column in trial.numbers]
        return statistics.median(found) if found else None

    def is_decided(self, repeats: int) -> bool:
        """Whether all seeds have ended; a point whose first seed did not finish gets no others."""
        is_whole = len(self.trials) == repeats or self.trials[0].status != FINISHED
        return is_whole and self.ended


class TrialTable(dict[str, Trial]):
    """The trials of an experiment by id, in the order in which they were planned."""

    def add(self, trial: Trial) -> Trial:
        """Adds a trial, or returns the one with this id; that one becomes pending if it has not ended."""
        found = self.setdefault(trial.id, trial)
        if found is not trial and not found.ended:
            found.status, found.reason = PENDING, ""
        return found

    def of(self, stage: str, point: str) -> list[Trial]:
        """All seeds of a point."""
        return [t for t in self.values() if (t.stage, t.point) == (stage, point)]

    def points(self, stage: str, scoring: Scoring) -> list[Point]:
        """The points of a stage with all their seeds."""
        groups: dict[str, list[Trial]] = {}
        for trial in self.values():
            if trial.stage == stage:
                groups.setdefault(trial.point, []).append(trial)
        return [Point(name, trials, scoring) for name, trials in groups.items()]

    def open(self, stages: Sequence[str]) -> list[Trial]:
        """Trials of some stages that have not ended."""
        return [trial for trial in self.values() if trial.stage in stages and not trial.ended]

    def count(self, *statuses: str) -> int:
        """Trials in any of some states."""
        return sum(trial.status in statuses for trial in self.values())


def trials_csv(trials: Iterable[Trial], parameters: Sequence[str]) -> str:
    """The content of `trials.csv`; unknown values are empty."""
    head = ["trial_id", "stage", "point", "status", "reason", "seed"]
    head += [*parameters, "reached", *NUMBERS, "run_folder", "parent"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, head, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for trial in trials:
        nulls = {name: "null" for name in parameters if trial.parameters[name] is None}
        writer.writerow({**{k: _cell(v) for k, v in as_row(trial).items()}, **nulls})
    return buffer.getvalue()


def as_row(trial: Trial) -> dict[str, Any]:
    """A trial by the columns of `trials.csv`; unknown values are None."""
    return {
        "trial_id": trial.id,
        "stage": trial.stage,
        "point": trial.point,
        "status": trial.status,
        "reason": trial.reason,
        "seed": trial.seed,
        **trial.parameters,
        "reached": trial.reached,
        **{name: trial.numbers.get(name) for name in NUMBERS},
        "run_folder": trial.run_folder,
        "parent": trial.parent,
    }


def read_trials(text: str, parameters: Sequence[str] | None = None) -> TrialTable:
    """The trials of a `trials.csv`, whatever of it can be read.

    Args:
        parameters: Columns of searched parameters; None takes those with a dot in their name.
    """
    table = TrialTable()
    for index, cells in enumerate(csv.DictReader(io.StringIO(text))):
        get = {str(name): str(cell or "") for name, cell in cells.items()}.get
        columns = [name for name in cells if "." in str(name)] if parameters is None else parameters
        identity, seed = get("trial_id") or f"#{index}", get("seed") or ""
        table[identity] = Trial(
            id=identity,
            point=get("point") or identity,
            seed=int(seed) if seed.isdecimal() else 0,
            stage=get("stage") or "search",
            parameters={name: _parsed(get(name) or "") for name in columns},
            status=get("status") or PENDING,
            reason=get("reason") or "",
            reached={"true": True, "false": False}.get((get("reached") or "").lower()),
            numbers={
                n: v
                for n in NUMBERS
                if (v := _finite(get(n) or get(_BEFORE.get(n, "")) or "")) is not None
            },
            run_folder=get("run_folder") or "",
            parent=get("parent") or "",
            index=index,
        )
    return table


def damage_of(text: str, table: TrialTable, parameters: Sequence[str]) -> str | None:
    """What is wrong with a `trials.csv` that was read as `table`; None if nothing is."""
    lines = list(csv.reader(io.StringIO(text)))
    head = next(csv.reader(io.StringIO(trials_csv([], parameters))))
    if not lines or lines[0] != head:
        return "the first line is not the names of the columns"
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(head):
            return f"line {number} has {len(cells)} cells instead of {len(head)}"
    for trial in table.values():
        searched = trial.stage == "search"
        if trial.status not in (PENDING, RUNNING, *ENDED) or (
            searched and not trial.point.isdecimal()
        ):
            return f"trial {trial.id} is {trial.status or 'nothing'} of point {trial.point}"
    if len(table) != len(lines) - 1:
        return "two lines have the same trial_id"
    return None


def is_real(value: Any) -> TypeGuard[int | float]:
    """Whether a parameter's value is a number; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value)


def _parsed(text: str) -> Any:
    try:
        return parsed(text)
    except ValueError:
        return text


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
