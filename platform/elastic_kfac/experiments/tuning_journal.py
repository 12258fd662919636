"""The books of a search: which trials there are, how each ended, and what follows from that.

The files are the memory: a search that was killed is continued from them, unfinished trials from
their run folders. `tuning` describes every file.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import elastic_kfac
from elastic_kfac.config import Config
from elastic_kfac.errors import UsageError
from elastic_kfac.experiments.objective import Outcome, censoring_rule, median_index, score
from elastic_kfac.experiments.search_folder import ENDED, NUMBERS
from elastic_kfac.experiments.search_space import METRICS, SearchSpace


@dataclass
class TrialRow:
    """One trial."""

    trial_id: str
    stage: str
    """`reference`, `search` or `confirm`."""
    point: str
    """Number of the searched point, or the reference's name."""
    seed: int
    parameters: dict[str, Any]
    status: str = "pending"
    reason: str = ""
    reached: bool | None = None
    numbers: dict[str, float | None] = field(default_factory=dict)
    run_folder: str = ""
    parent: str = ""

    @property
    def is_final(self) -> bool:
        return self.status in ENDED

    @property
    def outcome(self) -> Outcome:
        """What it came to; a failed, refused or stopped trial is censored."""
        value = self.numbers.get("objective") if self.reached else None
        return Outcome(value, self.numbers.get("best_accuracy"))

    def as_mapping(self) -> dict[str, Any]:
        """The columns of `trials.csv`; unknown values are None."""
        return {
            "trial_id": self.trial_id,
            "stage": self.stage,
            "point": self.point,
            "status": self.status,
            "reason": self.reason,
            "seed": self.seed,
            **self.parameters,
            "reached": self.reached,
            **{name: self.numbers.get(name) for name in NUMBERS},
            "run_folder": self.run_folder,
            "parent": self.parent,
        }


class Journal:
    """Reads and writes `experiment.json`, `trials.csv` and `best_config.yaml` of one search."""

    def __init__(self, folder: Path, name: str, space: SearchSpace) -> None:
        """Opens the books; those of an earlier call are continued.

        Raises:
            UsageError: If the folder holds a search of another space, or something else.
        """
        self.folder = folder
        self.name = name
        self.space = space
        self.rows: dict[str, TrialRow] = {}
        self.hardware: dict[str, str] = {}
        self.started = time.time()
        self.status = "running"
        stored = _read_json(folder / "experiment.json")
        if stored is not None:
            if stored.get("space") != _jsonable(space):
                raise UsageError(
                    "this search exists with another space",
                    given=f"--name {name}",
                    change="use another name, or the space that it was started with",
                )
            self.started = float(stored["started"])
            self.rows = {row.trial_id: row for row in self._read_rows()}
        elif (folder / "config.yaml").exists():
            raise UsageError("this name belongs to a run", given=name, change="use another name")
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_continued(self) -> bool:
        """Whether an earlier call left trials."""
        return bool(self.rows)

    def add(self, row: TrialRow) -> TrialRow:
        """Adds a trial, or returns the one of this id that is there already."""
        found = self.rows.setdefault(row.trial_id, row)
        if found is not row and not found.is_final:
            found.status, found.reason = "pending", ""
        return found

    def repeats(self, stage: str, point: str) -> list[TrialRow]:
        """All trials of a point."""
        return [row for row in self.rows.values() if (row.stage, row.point) == (stage, point)]

    def first_seeds(self) -> list[TrialRow]:
        """The trial of every searched point that decides whether its other seeds run."""
        rows, first = self.rows.values(), self.space.base.train.seed
        return [row for row in rows if row.stage == "search" and row.seed == first]

    def is_decided(self, rows: Sequence[TrialRow]) -> bool:
        """Whether all seeds of a point have ended; without a first that finished there are no more."""
        is_whole = len(rows) == self.space.repeats or rows[0].status != "finished"
        return is_whole and all(row.is_final for row in rows)

    def representative(self, rows: Sequence[TrialRow]) -> TrialRow:
        """The median repeat."""
        outcomes = [row.outcome for row in rows]
        return rows[median_index(outcomes, self.space.objective)]

    def score_of(self, rows: Sequence[TrialRow]) -> float:
        """The score of a point: that of its median repeat."""
        return score(self.representative(rows).outcome, self.space.objective)

    def best(self) -> TrialRow | None:
        """The median repeat of the best searched point that is decided, if it ended fully."""
        groups = [self.repeats("search", first.point) for first in self.first_seeds()]
        candidates = [
            rows
            for rows in groups
            if self.is_decided(rows) and self.representative(rows).status == "finished"
        ]
        if not candidates:
            return None
        return self.representative(min(candidates, key=self.score_of))

    def config_of(self, row: TrialRow) -> Config:
        """The configuration of a trial."""
        return self.space.config(self.point_of(row), row.seed)

    def point_of(self, row: TrialRow) -> dict[str, Any]:
        """A trial's values, those of a reference that are not searched included."""
        reference = row.point.removeprefix("confirm-")
        if row.stage == "search" or reference not in self.space.references:
            return dict(row.parameters)
        return {**row.parameters, **self.space.references[reference]}

    def write(self) -> None:
        """Replaces all files."""
        rows = list(self.rows.values())
        _replace(self.folder / "trials.csv", _table(rows, self.space))
        best = self.best()
        if best is not None:
            shipped = self.space.shipped_config(self.point_of(best)).model_dump(mode="json")
            text = yaml.safe_dump(shipped, sort_keys=False)
            _replace(self.folder / "best_config.yaml", text)
        references = {
            name: {
                "config": self.space.config(
                    {**self.space.default_point(), **point}, self.space.base.train.seed
                ).model_dump(mode="json"),
                "rows": [row.as_mapping() for row in self.repeats("reference", name)],
            }
            for name, point in self.space.references.items()
        }
        confirmed: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row.stage == "confirm":
                confirmed.setdefault(row.point.removeprefix("confirm-"), []).append(
                    row.as_mapping()
                )
        objective = self.space.objective
        experiment = {
            "name": self.name,
            "status": self.status,
            "started": self.started,
            "updated": time.time(),
            "objective": {
                "metric": objective.metric,
                "mode": "min",
                "unit": METRICS[objective.metric],
            },
            "target_accuracy": objective.target_accuracy,
            "rule_for_censored": censoring_rule(objective),
            "n_repeats": self.space.repeats,
            "parameters": list(self.space.parameters),
            "best": None if best is None else best.trial_id,
            "best_point": None if best is None else int(best.point),
            "default": references.get("default"),
            "references": references,
            "confirmation": {"n": self.space.confirm, "rows": confirmed} if confirmed else None,
            "hardware": self.hardware,
            "versions": versions(),
            "space": _jsonable(self.space),
        }
        _replace(self.folder / "experiment.json", json.dumps(experiment, indent=1) + "\n")

    def _read_rows(self) -> Iterable[TrialRow]:
        path = self.folder / "trials.csv"
        if not path.exists():
            return
        for cells in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))):
            yield TrialRow(
                trial_id=cells["trial_id"],
                stage=cells["stage"],
                point=cells["point"],
                seed=int(cells["seed"]),
                parameters={key: _parsed(cells[key]) for key in self.space.parameters},
                status=cells["status"],
                reason=cells["reason"],
                reached={"true": True, "false": False}.get(cells["reached"]),
                numbers={name: float(cells[name]) for name in NUMBERS if cells[name]},
                run_folder=cells["run_folder"],
                parent=cells["parent"],
            )


def hardware_of(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the cluster is made of, for people."""
    alive = [node for node in nodes if node.get("Alive")]
    hosts = {node.get("NodeManagerHostname") for node in alive}
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "machines": str(len(hosts)),
        "nodes": str(len(alive)),
        "logical_cpus": f"{sum(node['Resources'].get('CPU', 0) for node in alive):g}",
        "logical_gpus": f"{sum(node['Resources'].get('GPU', 0) for node in alive):g}",
    }


def versions() -> dict[str, str]:
    """What took part."""
    found = {"elastic-kfac": elastic_kfac.__version__, "python": platform.python_version()}
    for package in ("torch", "ray", "optuna"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _table(rows: Sequence[TrialRow], space: SearchSpace) -> str:
    parameters = dict.fromkeys(space.parameters)
    columns = list(TrialRow("", "", "", 0, parameters).as_mapping())
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        mapping = row.as_mapping()
        writer.writerow(_cell(mapping[name], explicit=name in space.parameters) for name in columns)
    return out.getvalue()


def _cell(value: Any, *, explicit: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "null" if explicit else ""
    return json.dumps(value)


def _parsed(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _jsonable(space: SearchSpace) -> Any:
    return json.loads(space.model_dump_json())


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
