"""The folder of a search, `<storage>/<name>/`: its memory, which `tune` writes and every page is made of.

One process writes, and it replaces every file as a whole; a search that was killed continues from them.

`experiment.json`
    `name`; `space`: the resolved search space (a mapping, as `SearchSpace.model_dump(mode="json")`);
    `objective`: `{metric, mode: "min", unit}`; `target`: `{metric, value}` (of accuracy also
    `target_accuracy`); `direction`; `rule_for_censored`: a sentence;
    `started`: Unix time of the first call; `updated`; `status`: `running | finished | interrupted |
    failed`; `hardware` and `versions`: mappings of strings; `n_repeats`: seeds per point;
    `references`: name -> `{config: resolved configuration, rows: [trials.csv rows as mappings]}`, of
    which `default` is the base configuration (also at the top as `default`), and others such as `sgd`
    are those that the space names; `best`: trial id of the best finished search trial (the median
    seed of the best point) or null; `best_point`: number of that point or null; `parameters`: the
    searched `section.key` names; `confirmation`: null, or `{n, rows: {best: [...], <reference>:
    [...]}}`: the winner and the references once more with seeds that the search did not use.
`trials.csv`
    One row per trial: `trial_id`, `stage` (`reference | search | confirm`), `point` (number of the
    searched point, or name of the reference), `status` (`running | finished | stopped | failed |
    refused | shared | pruned | pending`), `reason`, `seed`, one column per parameter (`section.key`),
    `objective`, `reached` (`true`/`false`/empty), `train_time_to_accuracy_s`, `time_to_accuracy_s`,
    `steps`, `train_time_s`, `worker_seconds`, `cpu_seconds`, `best_value`, `peak_memory_bytes`,
    `model_memory_bytes` (of a worker on emulated links, by the model), `started`, `ended` (Unix time),
    `run_folder` (relative to the experiment's folder), `parent` (trial whose state a PB2 clone
    continued from, or whose training this one shares). Unknown values are empty.
`trials/<trial_id>/`
    An ordinary run folder: `config.yaml`, `metrics.jsonl`, `events.jsonl`, `result.json`, …; absent
    for refused, shared and pending trials, and those pruned before they began.
`best_config.yaml`
    A configuration for `elastic-kfac train`; there once a search trial has finished.
`tune/`
    Ray Tune's own files; TensorBoard events of every trial (`tensorboard --logdir <folder>`).
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import elastic_kfac
from elastic_kfac.config import Config, dump_yaml
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.experiments.search_space import SearchSpace, parse_space
from elastic_kfac.experiments.trials import (
    ENDED,
    FINISHED,
    PENDING,
    PRUNED,
    REFUSED,
    RUNNING,
    SHARED,
    Evaluation,
    Point,
    Resize,
    Scoring,
    Trial,
    TrialTable,
    as_row,
    damage_of,
    read_trials,
    trials_csv,
)
from elastic_kfac.host import processor_name
from elastic_kfac.json_text import parsed
from elastic_kfac.observability.quality import Direction
from elastic_kfac.paths import local_folder
from elastic_kfac.runs.history import is_change, number
from elastic_kfac.runs.tracking import TrackedTrial, tracked_trials
from elastic_kfac.state.claim import claimed
from elastic_kfac.state.run_folder import RunFolder

EXPERIMENT = "experiment.json"
BEST = "best"


@contextlib.contextmanager
def claimed_search(
    folder: Path, name: str, space: SearchSpace, say: Callable[[str], None]
) -> Iterator[SearchFolder]:
    """Opens the folder of a search in which only this process writes.

    Raises:
        UsageError: As of `claimed` and `SearchFolder`.
    """
    with claimed(Storage(folder), f"search {name}", say=say):
        yield SearchFolder(folder, name, space)


class SearchFolder:
    """The trial table of a running search, and the files that hold it."""

    def __init__(self, folder: Path, name: str, space: SearchSpace) -> None:
        """Opens the folder; the trials of an earlier call are continued.

        Raises:
            UsageError: If the folder holds a search of another space, or something else.
        """
        self.folder = folder
        self.name = name
        self.space = space
        self.scoring = space.objective.scoring
        self.trials = TrialTable()
        self.ended_before = 0
        """Trials that an earlier call has ended."""
        self.hardware: dict[str, str] = {}
        self.started = time.time()
        self.status = RUNNING
        if is_experiment(folder) or (folder / "trials.csv").exists():
            self._take_over(_about(folder), _text_of(folder / "trials.csv") or "")
        elif (folder / "config.yaml").exists():
            raise UsageError("this name belongs to a run", given=name, change="use another name")
        folder.mkdir(parents=True, exist_ok=True)

    def _take_over(self, stored: Mapping[str, Any], text: str) -> None:
        """Continues an earlier call, from its record.

        Raises:
            UsageError: If the space differs in more than the number of trials, or the record is damaged.
        """
        theirs = mapping(stored.get("space"))
        with contextlib.suppress(
            ConfigError
        ):  # It may lack keys that are new, with their defaults.
            theirs = parse_space(theirs).model_dump(mode="json")
        may_differ = {"keep_states", "prune"} | (set() if self.space.perturbed else {"num_trials"})
        ours = self.space.model_dump(mode="json")
        for each in (theirs, ours):  # Where metrics go as well changes no trial.
            mapping(each.get("base")).pop("tracking", None)  # type: ignore[attr-defined]
        differing = [key for key in _differences(theirs, ours) if key not in may_differ]
        if differing:
            raise UsageError(
                f"this search exists with another space: {', '.join(differing[:5])} differ",
                given=f"--name {self.name}",
                allowed="the space that it was started with, or more num_trials",
                change="use another name, or that space",
            )
        self.started = number(stored, "started") or self.started
        try:
            self.trials = read_trials(text, list(self.space.parameters))
            problem = damage_of(text, self.trials, list(self.space.parameters))
        except csv.Error as error:
            problem = str(error)
        if len(self.trials) < (number(stored, "num_rows") or 0):
            problem = f"{len(self.trials)} of {stored['num_rows']} trials are left"
        if problem is not None:
            raise UsageError(
                f"the record of this search is damaged: {problem}",
                given=self.folder / "trials.csv",
                change="restore the file from a copy, or use another name",
            )
        self.ended_before = self.trials.count(*ENDED)

    def run_folder(self, trial_id: str) -> Path:
        """The folder of a trial's run."""
        return self.folder / "trials" / trial_id

    def seeds_of(self, trial: Trial) -> Point:
        """The point of a trial with all its seeds."""
        return Point(trial.point, self.trials.of(trial.stage, trial.point), self.scoring)

    def first_seeds(self) -> list[Trial]:
        """The trial of every searched point that decides whether its other seeds run."""
        first = self.space.base.train.seed
        return [t for t in self.trials.values() if t.stage == "search" and t.seed == first]

    def score_of(self, trial: Trial) -> float | None:
        """The score of a trial's point, that of its median seed; None until it is decided."""
        point = self.seeds_of(trial)
        decided = point.is_decided(self.space.repeats)
        return self.scoring.score(point.representative) if decided else None

    def best(self) -> Trial | None:
        """The median seed of the best decided point, if it finished."""
        decided = [
            point
            for point in self.trials.points("search", self.scoring)
            if point.is_decided(self.space.repeats) and point.representative.status == FINISHED
        ]
        return min(decided, key=lambda p: p.rank).representative if decided else None

    def config_of(self, trial: Trial) -> Config:
        """The configuration of a trial."""
        return self.space.config(self.values_of(trial), trial.seed)

    def tracking(self) -> AbstractContextManager[None]:
        """Sends the trials' metrics to the trackers of the base configuration, within the block."""
        tracking = self.space.base.tracking
        return tracked_trials(tracking, str(self.folder), self.name, self._tracked)

    def _tracked(self) -> list[TrackedTrial]:
        """The trials that train, as trackers see them."""
        return [
            TrackedTrial(
                trial.id,
                str(self.run_folder(trial.id)),
                partial(self.config_of, trial),
                {PENDING: None, RUNNING: ""}.get(trial.status, trial.status),
            )
            for trial in list(self.trials.values())  # Ray Tune's thread may add trials meanwhile.
            if trial.status not in (REFUSED, SHARED)
            and (trial.status != PRUNED or trial.run_folder)
        ]

    def values_of(self, trial: Trial) -> dict[str, Any]:
        """A trial's values, those of a reference that are not searched included."""
        reference = trial.point.removeprefix("confirm-")
        if trial.stage == "search" or reference not in self.space.references:
            return dict(trial.parameters)
        return {**trial.parameters, **self.space.references[reference]}

    def drop_states(self, *statuses: str) -> None:
        """Deletes the checkpoints of searched trials with these states whose point has lost."""
        best = self.best()
        for trial in self.trials.values():
            lost = best is not None and trial.point != best.point
            lost = lost and self.seeds_of(trial).is_decided(self.space.repeats)
            if lost and trial.stage == "search" and trial.status in statuses:
                run = Storage(self.run_folder(trial.id))
                if run.exists("ledger.parquet"):  # The proof of `audit` stays.
                    run.delete("ledger")
                run.delete("checkpoints")

    def drop_tune_checkpoints(self) -> None:
        """Deletes the copies of states by which a population passed them on."""
        for copy in self.folder.glob("tune/*/checkpoint_*"):
            shutil.rmtree(copy)

    def write(self) -> None:
        """Replaces all files."""
        best, storage = self.best(), Storage(self.folder)
        table = trials_csv(self.trials.values(), list(self.space.parameters))
        storage.write("trials.csv", table.encode())
        if best is not None:
            shipped = self.space.shipped_config(self.values_of(best)).model_dump(mode="json")
            storage.write("best_config.yaml", dump_yaml(shipped).encode())
        storage.write(EXPERIMENT, (json.dumps(self._about(best), indent=1) + "\n").encode())

    def _about(self, best: Trial | None) -> dict[str, Any]:
        space, objective = self.space, self.space.objective
        references = {
            name: {
                "config": space.config(
                    {**space.default_point(), **point}, space.base.train.seed
                ).model_dump(mode="json"),
                "rows": [as_row(trial) for trial in self.trials.of("reference", name)],
            }
            for name, point in space.references.items()
        }
        confirmed: dict[str, list[dict[str, Any]]] = {}
        for trial in self.trials.values():
            if trial.stage == "confirm":
                name = trial.point.removeprefix("confirm-")
                confirmed.setdefault(name, []).append(as_row(trial))
        return {
            "name": self.name,
            "status": self.status,
            "started": self.started,
            "updated": time.time(),
            "num_rows": len(self.trials),
            "objective": {"metric": objective.metric, "mode": "min", "unit": objective.unit},
            "target": objective.goal.model_dump(),
            **(
                {"target_accuracy": objective.goal.value}
                if objective.goal.metric == "accuracy"
                else {}
            ),
            "direction": objective.quality.direction,
            "rule_for_censored": objective.censoring_rule,
            "n_repeats": space.repeats,
            "parameters": list(space.parameters),
            "best": None if best is None else best.id,
            "best_point": None if best is None else int(best.point),
            "default": references.get("default"),
            "references": references,
            "confirmation": {"n": space.confirm, "rows": confirmed} if confirmed else None,
            "hardware": self.hardware,
            "versions": _versions(),
            "space": json.loads(space.model_dump_json()),
        }


@dataclass(frozen=True)
class Experiment:
    """A search as its folder holds it: running, ended, killed, or failed in every trial."""

    location: str
    about: Mapping[str, Any]
    """Content of `experiment.json`."""
    trials: TrialTable
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
        return str(self.about.get("status", RUNNING))

    @property
    def target(self) -> float | None:
        """The value to reach."""
        target = mapping(self.about.get("target"))
        # Searches of earlier versions.
        return number(target, "value") if target else number(self.about, "target_accuracy")

    @property
    def quality(self) -> str:
        """The metric to reach it in."""
        return str(mapping(self.about.get("target")).get("metric") or "accuracy")

    @property
    def direction(self) -> Direction:
        """Whether larger or smaller values of it are better."""
        return "min" if self.about.get("direction") == "min" else "max"

    @property
    def metric(self) -> str:
        """Name of the minimised column."""
        return str(mapping(self.about.get("objective")).get("metric", "train_time_to_accuracy_s"))

    @property
    def unit(self) -> str:
        """Unit of the objective in words."""
        return str(mapping(self.about.get("objective")).get("unit") or "seconds")

    @property
    def space(self) -> Mapping[str, Any]:
        """The resolved search space."""
        return mapping(self.about.get("space"))

    @property
    def repeats(self) -> int:
        """Seeds per point."""
        return max(1, int(number(self.about, "n_repeats") or 1))

    @cached_property
    def scoring(self) -> Scoring:
        """The order of trials."""
        rule = mapping(self.space.get("objective")).get("censored", "by_distance")
        return Scoring(self.target, str(rule), self.direction)

    @cached_property
    def points(self) -> list[Point]:
        """Every searched configuration: the best first, then undecided ones."""
        found = self.trials.points("search", self.scoring)
        return sorted(found, key=lambda point: (not point.tried, point.ended, point.rank))

    @cached_property
    def references(self) -> dict[str, Point]:
        """Configurations to compare with, by name."""
        return {point.name: point for point in self.trials.points("reference", self.scoring)}

    @cached_property
    def confirmed(self) -> dict[str, Point]:
        """The winner (`best`) and the references once more, with seeds unseen by the search."""
        points = self.trials.points("confirm", self.scoring)
        return {p.name.removeprefix("confirm-"): p for p in points if p.ended}

    @cached_property
    def best(self) -> Point | None:
        """The point that the search chose; None while there is none."""
        chosen = str(self.about.get("best") or "")
        for point in self.points:
            if chosen and any(trial.id == chosen for trial in point.trials):
                return point
        finished = (p for p in self.points if p.tried and p.representative.status == FINISHED)
        return next(finished, None)

    @property
    def done(self) -> int:
        """Trials that have ended, in whatever way."""
        return sum(trial.ended for trial in self.trials.values())

    @property
    def total(self) -> int:
        """Trials that will have run at the end, as far as is known."""
        if self.status == FINISHED:
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


def is_experiment(folder: Path) -> bool:
    """Whether a folder holds a search."""
    return (folder / EXPERIMENT).is_file()


def _differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Paths at which two nested mappings differ."""
    if not (isinstance(theirs, Mapping) and isinstance(ours, Mapping)):
        return [] if theirs == ours else [path]
    found: list[str] = []
    for key in dict.fromkeys([*ours, *theirs]):
        below = f"{path}.{key}".removeprefix(".")
        found += _differences(theirs.get(key), ours.get(key), below)
    return found


def read_experiment(folder: Path) -> Experiment:
    """Reads the folder of a search.

    Raises:
        UsageError: If the folder is not there, holds no search, or its record is damaged.
    """
    if not is_experiment(folder):
        raise UsageError(
            "not the folder of a search", given=folder, change=f"name one that holds {EXPERIMENT}"
        )
    about = _about(folder)
    text = _text_of(folder / "trials.csv") or ""
    named = about.get("parameters")
    parameters = [str(name) for name in named] if isinstance(named, list) else None
    trials = read_trials(text, parameters)
    if problem := _problem_of(text, trials, number(about, "num_rows") or 0):
        raise UsageError(
            f"a damaged folder of a search: {problem}",
            given=folder / "trials.csv",
            change="restore the file from a copy",
        )
    metric = str(mapping(about.get("target")).get("metric") or "accuracy")
    for trial in trials.values():
        run = _inside(folder, trial.run_folder)
        if run is not None:
            trial.evaluations = list(_evaluations(RunFolder(run), metric))
            trial.resizes = list(_resizes(RunFolder(run)))
    if parameters is None:
        parameters = list(next(iter(trials.values())).parameters) if trials else []
    return Experiment(
        location=str(folder),
        about=about,
        trials=trials,
        parameters=parameters,
        csv=text,
        best_config=_text_of(folder / "best_config.yaml"),
        folder=folder,
    )


def _problem_of(text: str, trials: TrialTable, num_rows: float) -> str | None:
    """What makes a table's answers wrong; other versions may have had other columns."""
    if text and not text.startswith("trial_id,"):
        return "the first column is not trial_id"
    for trial in trials.values():
        if trial.status not in (PENDING, RUNNING, *ENDED):
            return f"trial {trial.id} has the unknown status {trial.status!r}"
    if text and len(trials) < num_rows:
        return f"{len(trials)} of {num_rows:g} trials are left"
    return None


def choices(parameter: Any) -> list[Any] | None:
    """The values of a discrete parameter of a space; None for an interval."""
    given = mapping(parameter)
    found = given.get("choice") or given.get("grid")
    return list(found) if isinstance(found, list | tuple) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping as it is; anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def hardware_of(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The machines of a cluster in words, from `ray.nodes()`."""
    alive = [node for node in nodes if node.get("Alive")]
    hosts = {node.get("NodeManagerHostname") for node in alive}
    return {
        "processor": processor_name(),
        "cores": str(os.cpu_count()),
        "machines": str(len(hosts)),
        "nodes": str(len(alive)),
        "logical_cpus": f"{sum(node['Resources'].get('CPU', 0) for node in alive):g}",
        "logical_gpus": f"{sum(node['Resources'].get('GPU', 0) for node in alive):g}",
    }


def _versions() -> dict[str, str]:
    found = {"elastic-kfac": elastic_kfac.__version__, "python": platform.python_version()}
    for package in ("torch", "ray", "optuna"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _inside(folder: Path, relative: str) -> Path | None:
    """A folder below the experiment's; None for one that is elsewhere or not there."""
    if not relative or "\0" in relative:
        return None
    run = (folder / relative).resolve()
    return run if run.is_relative_to(folder.resolve()) and run.is_dir() else None


def _evaluations(run: RunFolder, metric: str) -> Iterator[Evaluation]:
    for row in run.rows("metrics.jsonl", f'"eval_{metric}"'.encode())[0]:
        seconds = number(row, "train_time_s")
        seconds = number(row, "wall_time_s") if seconds is None else seconds
        found = (number(row, "step"), seconds, number(row, f"eval_{metric}"))
        known = [value for value in found if value is not None and math.isfinite(value)]
        if len(known) == 3:
            yield Evaluation(*known)


def _resizes(run: RunFolder) -> Iterator[Resize]:
    for row in run.events():
        time_s = number(row, "time")
        if time_s is not None and is_change(row):
            yield Resize(time_s, int(row["from_world_size"]), int(row["to_world_size"]))


def _about(folder: Path) -> dict[str, Any]:
    """The content of `experiment.json`.

    Raises:
        UsageError: If it is missing or damaged.
    """
    problem, about = "it is not a mapping", None
    try:
        about = parsed((folder / EXPERIMENT).read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError) as error:
        problem = str(error)
    if not isinstance(about, dict):
        raise UsageError(
            f"a damaged folder of a search: {problem}",
            given=folder / EXPERIMENT,
            change="restore the file from a copy, or use another name",
        )
    return about


def _text_of(path: Path) -> str | None:
    try:
        # Spreadsheets put a mark of the encoding first.
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return None


def searches_folder(storage: str) -> Path:
    """The folder that `--storage` names.

    Raises:
        UsageError: If it is an object store.
    """
    folder = local_folder(storage)
    if folder is None:
        raise UsageError(
            "a search keeps its files in a folder",
            given=f"--storage {storage}",
            allowed="a path that every node of the cluster reaches",
        )
    return folder.absolute()
