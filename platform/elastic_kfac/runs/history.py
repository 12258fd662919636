"""The record of a run, read from its folder, and quantities derived from it.

A running or crashed run has no `result.json` and may end in half a line; everything here works on
the rows that exist.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from elastic_kfac.json_text import parsed
from elastic_kfac.observability.quality import Direction, is_worse, quality_of
from elastic_kfac.state.run_folder import Row, RunFolder

FINISHED = "finished"
CAUSES = ("failure", "fallback")
"""Kinds of events that say why the workers change; the row of the change follows."""
ANALYSES = "analysis"
"""Folder of the JSON files of `analyze` and the probes."""


@dataclass(frozen=True)
class Segment:
    """A stretch of committed steps at one world size."""

    world_size: int
    first_step: int
    last_step: int
    first_wall_s: float
    last_wall_s: float


@dataclass(frozen=True)
class Pause:
    """Time between two calls for one run, in which the run did not exist; no wall time counts it."""

    step: int
    """First step afterwards."""
    wall_s: float
    """Wall time of that step."""
    away_s: float | None
    """Seconds between the calls; None if not recorded."""


@dataclass(frozen=True)
class Run:
    """One run folder, read once."""

    name: str
    location: str
    config: Mapping[str, Any]
    metrics: Sequence[Row]
    events: Sequence[Row]
    result: Mapping[str, Any] | None
    torn_lines: int = field(default=0)
    analyses: Sequence[Row] = ()
    """Analyses of the loss surface, in training and afterwards; oldest step first."""

    @cached_property
    def steps(self) -> list[Row]:
        """Rows of training steps, in the order in which they were written."""
        return [row for row in self.metrics if is_step(row)]

    @cached_property
    def evaluations(self) -> list[tuple[int, float, float, float | None]]:
        """(step, wall time [s], value of `metric`, loss) of every evaluation."""
        found = []
        for row in self.metrics:
            value = number(row, f"eval_{self.metric}")
            if value is not None and number(row, "step") is not None:
                wall = number(row, "wall_time_s") or 0.0
                found.append((int(row["step"]), wall, value, number(row, "eval_loss")))
        return found

    @cached_property
    def metric(self) -> str:
        """The metric of the target, or else the most important one of the task."""
        target = self.config.get("train", {}).get("target")
        named = target.get("metric") if isinstance(target, dict) else None
        rows = (row.get("metric") for row in reversed(self.metrics) if is_evaluation(row))
        return str((self.result or {}).get("metric") or named or next(rows, None) or "accuracy")

    @cached_property
    def direction(self) -> Direction:
        """Whether larger or smaller values of `metric` are better."""
        rows = (row.get("direction") for row in reversed(self.metrics) if is_evaluation(row))
        own: Direction = "min" if next(rows, None) == "min" else "max"
        return quality_of(self.metric, own).direction

    @cached_property
    def segments(self) -> list[Segment]:
        """Stretches of equal world size; a restart at the same size does not split one."""
        found = []
        sized = [row for row in self.steps if number(row, "world_size") is not None]
        for size, same in groupby(sized, lambda row: int(row["world_size"])):
            rows = list(same)
            steps = (int(rows[index]["step"]) for index in (0, -1))
            walls = (number(rows[index], "wall_time_s") or 0.0 for index in (0, -1))
            found.append(Segment(size, *steps, *walls))
        return found

    @cached_property
    def world_sizes(self) -> list[int]:
        """World sizes of the steps, in order."""
        return [segment.world_size for segment in self.segments]

    @cached_property
    def changes(self) -> list[Row]:
        """Events that changed the group of workers, except the first start.

        The reason of a loss stands in the rows of failures before that of the recovery; here each change
        has its reason.
        """
        found: list[Row] = []
        causes: list[str] = []
        for event in self.events:
            if event.get("kind") in CAUSES and event.get("reason"):
                causes.append(str(event["reason"]))
            elif is_change(event):
                reason = event.get("reason") or "; ".join(dict.fromkeys(causes))
                found.append({**event, "reason": reason})
                causes = []
        return found

    @cached_property
    def pauses(self) -> list[Pause]:
        """Where the run was continued under its name by another call."""
        found = []
        for event in self.events:
            if event.get("kind") == "continue" and number(event, "step") is not None:
                step = int(event["step"] - (number(event, "steps_redone") or 0)) + 1
                walls = [number(r, "wall_time_s") or 0.0 for r in self.steps if r["step"] >= step]
                found.append(Pause(step, min(walls, default=0.0), number(event, "away_s")))
        return found

    @property
    def finished(self) -> bool:
        """Whether the run finished."""
        return self.result is not None and self.result.get("status") == FINISHED

    @cached_property
    def divergence(self) -> tuple[float, float] | None:
        """(first, last) training loss of a run whose loss ended above its start; None for any other.

        The last one is the median of the last five rows, and counts from 1.2 times the first on.
        """
        losses = [loss for row in self.steps if (loss := number(row, "loss")) is not None]
        if not losses:
            return None
        first, last = losses[0], statistics.median(losses[-5:])
        above = last > 1.2 * first > 0 or not math.isfinite(last)
        return (first, last) if above else None

    @property
    def best_value(self) -> float | None:
        """Best value of `metric` so far."""
        given = self._of_result("best_value", "best_accuracy")
        seen = [value for _, _, value, _ in self.evaluations]
        if given is not None or not seen:
            return given
        return max(seen) if self.direction == "max" else min(seen)

    @property
    def last_value(self) -> float | None:
        """Value of `metric` in the last evaluation."""
        return self.evaluations[-1][2] if self.evaluations else None

    @property
    def target_value(self) -> float | None:
        """Value of `metric` to reach; None without a target."""
        given = self._of_result("target_value", "target_accuracy")
        train = self.config.get("train", {})
        target = train.get("target")
        if isinstance(target, dict):
            asked = number(target, "value")
        else:
            asked = number(train, "target_accuracy")
        return given if given is not None else asked

    @property
    def time_to_target_s(self) -> float | None:
        """Wall-clock seconds to the target, downtime and evaluation included."""
        given = self._of_result("time_to_target_s", "time_to_accuracy_s")
        target = self.target_value
        if given is not None or target is None:
            return given
        reached = (
            wall
            for _, wall, value, _ in self.evaluations
            if not is_worse(value, target, self.direction)
        )
        return next(reached, None)

    def _of_result(self, name: str, before: str) -> float | None:
        """A number of the result, which runs of earlier versions have under another name."""
        given = number(self.result or {}, name)
        return number(self.result or {}, before) if given is None else given

    @property
    def last_step(self) -> int:
        """The last committed step that was logged."""
        given = number(self.result or {}, "steps")
        seen = max((int(row["step"]) for row in self.steps), default=0)
        return seen if given is None else int(given)

    @property
    def wall_time_s(self) -> float:
        """Seconds from the start to the newest row."""
        return max((number(row, "wall_time_s") or 0.0 for row in self.metrics), default=0.0)

    @property
    def downtime_s(self) -> float:
        """Seconds without steps around changes of the group."""
        return float(sum(number(event, "downtime_s") or 0.0 for event in self.changes))

    @property
    def steps_redone(self) -> int:
        """Steps that were redone after an unplanned loss."""
        given = number(self.result or {}, "steps_redone")
        if given is not None:
            return int(given)
        return int(sum(number(event, "steps_redone") or 0 for event in self.changes))

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Versions and hardware as recorded by the run; may be empty."""
        for row in (self.result or {}, *self.events):
            if isinstance(row.get("provenance"), dict):
                return dict(row["provenance"])
        return {}


def read_run(uri: str | Path) -> Run:
    """Reads a run's folder, local or remote.

    Raises:
        UsageError: If it holds no run, or `config.yaml` cannot be read. Other damaged
            files are counted as torn lines.
    """
    folder = RunFolder.existing(uri)
    found = folder.config_values()
    config = {key: part if isinstance(part, dict) else {} for key, part in found.items()}
    result = folder.result()
    metrics, torn_metrics = folder.rows("metrics.jsonl")
    events, torn_events = folder.rows("events.jsonl")
    name = folder.storage.path().rpartition("/")[2]
    torn = torn_metrics + torn_events + (result is None and folder.storage.exists("result.json"))
    return Run(name, str(uri), config, metrics, events, result, torn, _analyses(folder, metrics))


def is_evaluation(row: Row) -> bool:
    """Whether a row of `metrics.jsonl` comes from an evaluation."""
    return "eval_loss" in row or "eval_accuracy" in row


def is_step(row: Row) -> bool:
    """Whether a row of `metrics.jsonl` comes from one training step."""
    aside = is_evaluation(row) or "analysis_time_s" in row or "hessian_time_s" in row
    return "step" in row and not aside


def is_change(row: Row) -> bool:
    """Whether a row of `events.jsonl` tells that another group or world of workers steps."""
    # Failures of earlier versions have both sizes, too.
    sized = number(row, "from_world_size") and number(row, "to_world_size")
    return bool(sized) and row.get("kind") not in CAUSES


def number(row: Row, key: str) -> float | None:
    """A finite or infinite number of a row; None when it is missing or something else."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def first_number(row: Row, *keys: str) -> float | None:
    """The first of several columns that holds a number."""
    return next((value for key in keys if (value := number(row, key)) is not None), None)


def _analyses(folder: RunFolder, metrics: Sequence[Row]) -> list[Row]:
    found: list[Row] = [
        {**row["analysis"], "step": row.get("step"), "epoch": row.get("epoch")}
        for row in metrics
        if isinstance(row.get("analysis"), dict)
    ]
    for name in folder.storage.files(ANALYSES):
        if name.endswith(".json"):
            with contextlib.suppress(ValueError):
                row = parsed(folder.storage.read(f"{ANALYSES}/{name}"))
                found += [row] if isinstance(row, dict) else []
    return sorted(found, key=lambda row: number(row, "step") or 0.0)
