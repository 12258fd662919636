"""Searches for the configuration that trains to an accuracy fastest; every trial is an elastic run.

Files of an experiment, `<storage>/<name>/`, all of them written by this module's process alone and
replaced as a whole (a reader never sees half a file):

`experiment.json`
    `name`; `space`: the resolved search space (a mapping, as `SearchSpace.model_dump(mode="json")`);
    `objective`: `{metric, mode: "min", unit}`; `target_accuracy`; `rule_for_censored`: a sentence;
    `started`: Unix time of the first call; `updated`; `status`: `running | finished | interrupted |
    failed`; `hardware` and `versions`: mappings of strings; `n_repeats`: seeds per point;
    `references`: name -> `{config: resolved configuration, rows: [trials.csv rows as mappings]}`, of
    which `default` is the base configuration itself (also at the top as `default`), and others such
    as `sgd` are what the space names beside it; `best`: trial id of the best finished search trial
    (the median repeat of the best point) or null; `best_point`: number of that point or null;
    `parameters`: the searched `section.key` names; `confirmation`: null, or `{n, rows: {best: [...],
    <reference>: [...]}}`: the winner and the references once more with seeds that the search did not
    see.
`trials.csv`
    One row per trial, rewritten after every change: `trial_id`, `stage` (`reference | search |
    confirm`), `point` (number of the searched point, or the name of the reference), `status`
    (`running | finished | stopped | failed | refused | pending`), `reason`, `seed`, one column per
    parameter (`section.key`), `objective`, `reached` (`true`/`false`/empty),
    `train_time_to_accuracy_s`, `time_to_accuracy_s`, `steps`, `train_time_s`, `worker_seconds`,
    `cpu_seconds`, `best_accuracy`, `peak_memory_bytes`, `started`, `ended` (Unix time),
    `run_folder` (relative to the experiment's folder), `parent` (trial that a PB2 clone took its
    state from). Unknown values are empty.
`trials/<trial_id>/`
    An ordinary run folder: `config.yaml`, `metrics.jsonl`, `events.jsonl`, `result.json`, …; absent
    for refused and pending trials.
`best_config.yaml`
    What `elastic-kfac train` takes as it is; there once a search trial has finished.
`tune/`
    Ray Tune's own files; TensorBoard events of every trial (`tensorboard --logdir <folder>`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.logger import TBXLoggerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic_kfac.cluster.ray.connection import StopSignals, connected, environment, quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster, cluster_for
from elastic_kfac.cluster.ray.nodes import room_for_workers
from elastic_kfac.cluster.run.result import EXIT_INTERRUPTED
from elastic_kfac.cluster.run.worker import RANK_FUNCTION
from elastic_kfac.errors import ConfigError, RunError, UsageError
from elastic_kfac.experiments import tuning_rounds
from elastic_kfac.experiments.emulation import Emulator
from elastic_kfac.experiments.search_space import SearchSpace
from elastic_kfac.experiments.tuning_books import Listener, SearchBooks, StopWhen, trial_name
from elastic_kfac.experiments.tuning_desk import SearchDesk
from elastic_kfac.experiments.tuning_journal import Journal, TrialRow, hardware_of
from elastic_kfac.experiments.tuning_search import (
    Assignment,
    Suggestions,
    make_scheduler,
    param_space,
    planned_points,
)
from elastic_kfac.experiments.tuning_trial import TrialRun, TrialSettings
from elastic_kfac.runs.feasibility import why_infeasible

CONFIRMATION_SEED = 1000
"""Distance of the confirmation's seeds from those of the search."""

STOP_TIMEOUT_S = 120.0
"""How long a stop signal waits for the trials to save their states."""

_ENVIRONMENT = {
    # Relative paths of a configuration are meant from where the command was given.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The journal and TensorBoard are the only loggers.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class SearchResult:
    """How a search ended."""

    status: str
    """`finished` or `interrupted`."""
    folder: Path
    best: TrialRow | None
    rows: tuple[TrialRow, ...]

    @property
    def exit_code(self) -> int:
        """0 if there is a best trial; 1 if no trial came to an end; 130 interrupted."""
        if self.status == "interrupted":
            return EXIT_INTERRUPTED
        return 0 if self.best is not None else 1


def search(
    space: SearchSpace,
    *,
    name: str,
    write_page: Callable[[Path], object],
    storage: str = "./runs",
    address: str | None = None,
    cluster: LocalCluster | None = None,
    say: Callable[[str], None] = print,
    rank_function: str | None = None,
) -> SearchResult:
    """Searches until all trials have ended; the same `name` continues where an earlier call ended.

    Args:
        space: What to search.
        name: Name of the search; its folder is `<storage>/<name>`.
        write_page: Writes `report.html` into the search's folder.
        storage: Folder that every node of the cluster reaches.
        address: Address of a Ray cluster; None starts one on this machine with a node per worker of
            every concurrent trial.
        cluster: An embedded cluster to use and to leave running; this process is connected to it.
        say: Is told what happens, a line each.
        rank_function: `module:function` that runs one rank of a trial; None is the usual one.

    Raises:
        UsageError: If the search could not work; nothing was started then.
        RunError: If Ray Tune itself failed; the same name continues.
    """
    # It warns that files of Ray Tune's own loggers are missing; they are off.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    folder = _local_folder(storage) / name
    journal = Journal(folder, name, space)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        stack.enter_context(quiet_driver())
        stack.enter_context(environment(_ENVIRONMENT, user_wins=True))
        elastic = space.base.elastic
        if cluster is None and address is None:
            nodes = elastic.max_workers * space.max_concurrent
            say(f"Starting a local Ray cluster with {nodes} node{'s' * (nodes > 1)} …")
            cluster = stack.enter_context(cluster_for(space.base, nodes))
            cluster.connect()
        elif address is not None:
            stack.enter_context(connected(address))
        signals.defer()
        running = _Search(space, journal, say, write_page, rank_function)
        return running.finish(signals)


class _Search:
    """One call of `search`, connected to a cluster."""

    def __init__(
        self,
        space: SearchSpace,
        journal: Journal,
        say: Callable[[str], None],
        write_page: Callable[[Path], object],
        rank_function: str | None,
    ) -> None:
        self._space = space
        self._journal = journal
        self._say = say
        per_worker = space.base.resources.of_a_worker()
        # An autoscaler may bring the first nodes only when trials ask for them.
        self._room = room_for_workers(per_worker) or space.base.elastic.max_workers
        self._slots = min(
            space.max_concurrent, max(1, self._room // space.base.elastic.min_workers)
        )
        emulated = space.objective.metric == "emulated_time_to_accuracy_s"
        self._books = SearchBooks(
            journal, say, write_page, Emulator(space.links) if emulated else None
        )
        journal.hardware = hardware_of(ray.nodes())
        self._told = False
        self._plan()
        here = ray.get_runtime_context().get_node_id()
        self._desk: Any = (
            ray.remote(SearchDesk)
            .options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            )
            .remote(self._slots, per_worker)
        )
        self._books.desk = self._desk
        usual = tuning_rounds.RANK_FUNCTION if space.perturbed else RANK_FUNCTION
        self._settings = TrialSettings(
            space, str(journal.folder), self._desk, rank_function or usual
        )

    def finish(self, signals: StopSignals) -> SearchResult:
        """Runs what is left, in two stages, and closes the books."""
        journal = self._journal
        if journal.is_continued and any(row.is_final for row in journal.rows.values()):
            ended = sum(row.is_final for row in journal.rows.values())
            self._say(f"Search {journal.name} exists: continuing it after {ended} trials.")
        journal.status = "running"
        self._books.note()
        try:
            if self._space.perturbed:
                # Who changes its values in training is compared with its like only.
                self._run_stage(("reference",), signals, None)
                stages: tuple[str, ...] = ("search",)
            else:
                stages = ("reference", "search")
            wanted = True
            while wanted and signals.reason is None:
                self._run_stage(stages, signals, make_scheduler(self._space, self._slots))
                # That a first seed had arrived before it was stopped is known only now.
                wanted = bool(self._add_repeats())
            if signals.reason is None and self._space.confirm and journal.best() is not None:
                self._plan_confirmation()
                self._run_stage(("confirm",), signals, None)
        except BaseException:
            journal.status = "failed"
            raise
        else:
            journal.status = "interrupted" if signals.reason is not None else "finished"
        finally:
            self._books.close()
            ray.kill(self._desk)
        return SearchResult(
            journal.status, journal.folder, journal.best(), tuple(journal.rows.values())
        )

    # ---- trials ----------------------------------------------------------------------------

    def _plan(self) -> None:
        """Writes down every trial that is known before the search begins."""
        space, journal = self._space, self._journal
        for name, point in space.references.items():
            values = {**space.default_point(), **point}
            shown = {key: values[key] for key in space.parameters}
            for repeat in range(space.repeats):
                trial = f"{name}-s{repeat}"
                row = TrialRow(trial, "reference", name, space.base.train.seed + repeat, shown)
                self._admit(journal.add(row))
        if space.searcher.name != "optuna":
            for number, point in enumerate(planned_points(space)):
                self._add_trial(number, point)
            searched = [row for row in journal.rows.values() if row.stage == "search"]
            if all(row.status == "refused" for row in searched):
                raise ConfigError(
                    "no point of the search space can run here", given=searched[0].reason
                )
        journal.write()

    def _plan_confirmation(self) -> None:
        space, journal = self._space, self._journal
        best = journal.best()
        assert best is not None
        points: dict[str, Mapping[str, Any]] = {"best": best.parameters}
        for name in space.references:
            rows = journal.repeats("reference", name)
            points[name] = rows[0].parameters
        # A continued search may have found another winner: its confirmation is a new one.
        with self._books.lock:
            for row in list(journal.rows.values()):
                if row.point == "confirm-best" and row.parameters != best.parameters:
                    del journal.rows[row.trial_id]
            for repeat in range(space.confirm):
                seed = space.base.train.seed + CONFIRMATION_SEED + repeat
                for name, point in points.items():
                    trial = f"confirm-{name}-s{repeat}"
                    row = TrialRow(trial, "confirm", f"confirm-{name}", seed, dict(point))
                    self._admit(journal.add(row))

    def _add_trial(self, point: int, values: Mapping[str, Any], repeat: int = 0) -> TrialRow:
        trial = f"t{point:03d}" + (f"-s{repeat}" if self._space.repeats > 1 else "")
        seed = self._space.base.train.seed + repeat
        row = self._journal.add(TrialRow(trial, "search", str(point), seed, dict(values)))
        self._admit(row)
        return row

    def _add_repeats(self) -> list[TrialRow]:
        """The other seeds of points whose first has finished."""
        added = []
        for first in self._journal.first_seeds():
            known = len(self._journal.repeats("search", first.point))
            if first.status == "finished":
                for repeat in range(known, self._space.repeats):
                    added.append(self._add_trial(int(first.point), first.parameters, repeat))
        return added

    def _admit(self, row: TrialRow) -> None:
        """Refuses a trial that cannot work, before it costs anything."""
        if row.is_final:
            return
        try:
            reason = why_infeasible(self._journal.config_of(row), self._room)
        except ConfigError as error:
            reason = error.line()
        if reason is not None:
            row.status, row.reason = "refused", reason
            self._say(f"{row.trial_id} refused: {reason}")

    def _assignment(self, row: TrialRow) -> Assignment:
        return {
            "trial": row.trial_id,
            "stage": row.stage,
            "point": self._journal.point_of(row),
            "seed": row.seed,
            "screened": row.stage == "search" and row.seed == self._space.base.train.seed,
        }

    def _open(self, stages: Sequence[str]) -> list[TrialRow]:
        rows = self._journal.rows.values()
        return [row for row in rows if row.stage in stages and not row.is_final]

    # ---- running ---------------------------------------------------------------------------

    def _run_stage(
        self, stages: Sequence[str], signals: StopSignals, scheduler: Any | None
    ) -> None:
        is_population = "search" in stages and bool(self._space.perturbed)
        is_search = "search" in stages and not is_population
        if is_search:
            self._add_repeats()
        rows = self._open(stages)
        points = self._books.points_left() if is_search else 0
        if not rows and not points:
            return
        if not self._told:
            self._told = True
            most = f"{self._slots} at a time" if self._slots > 1 else "one after another"
            report = self._journal.folder / "report.html"
            self._say(f"Trials run {most}; to follow them: {report}")
        searcher = self._suggestions(rows, points) if is_search else None
        self._books.tell_waiting()
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(TrialRun, settings=self._settings),
                # The head is where a driver is safe; its workers ask for resources themselves.
                {"CPU": 0, "node:__internal_head__": 0.001},
            ),
            param_space={}
            if searcher is not None
            else param_space(self._space, [self._assignment(row) for row in rows]),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1 if searcher is not None else 1,
                # A population is created as a whole; its scheduler has the bound.
                max_concurrent_trials=None if is_population else self._slots,
                reuse_actors=True,
                trial_name_creator=trial_name,
                trial_dirname_creator=trial_name,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(self._journal.folder),
                stop=StopWhen(self._books.interrupted),
                callbacks=[Listener(self._books), TBXLoggerCallback()],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_frequency=0, checkpoint_at_end=False
                ),
            ),
        )
        failure: list[BaseException] = []

        def fit() -> None:
            try:
                tuner.fit()
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=fit, name="ray-tune", daemon=True)
        thread.start()
        give_up: float | None = None
        while thread.is_alive():
            if signals.reason is not None and give_up is None:
                self._say(f"{signals.reason}: trials save their state and stop …")
                if searcher is not None:
                    searcher.close()
                self._books.why_interrupted = f"interrupted by {signals.reason}"
                ray.get(self._desk.stop.remote(self._books.why_interrupted))
                give_up = time.monotonic() + STOP_TIMEOUT_S
            if give_up is not None and (
                time.monotonic() > give_up or not ray.get(self._desk.live.remote())
            ):
                # From here on Ray Tune ends its actors, however far they are.
                self._books.interrupted.set()
            self._books.report_news()
            thread.join(0.2)
        self._books.settle()
        if failure and not self._books.interrupted.is_set():
            text = str(failure[0]).strip().splitlines() or [""]
            raise RunError(
                f"Ray Tune ended the search: {type(failure[0]).__name__}: {text[-1]}",
                change="the same --name continues it",
            ) from failure[0]

    def _suggestions(self, rows: Sequence[TrialRow], points: int) -> Suggestions:
        journal = self._journal
        evaluated = []
        for row in journal.first_seeds():
            repeats = journal.repeats("search", row.point)
            if row.status != "refused" and journal.is_decided(repeats):
                evaluated.append((row.parameters, journal.score_of(repeats)))

        def on_point(values: Mapping[str, Any]) -> list[Assignment]:
            with self._books.lock:
                number = self._space.num_trials - self._books.points_left()
                row = self._add_trial(number, values)
                self._books.note()
                return [] if row.is_final else [self._assignment(row)]

        def repeats_due() -> list[Assignment] | None:
            with self._books.lock:
                added = self._add_repeats()
                if added:
                    self._books.note()
                some_may_come = self._space.repeats > 1 and not all(
                    row.is_final for row in journal.first_seeds()
                )
                return [self._assignment(row) for row in added] if added or some_may_come else None

        def score_of(assignment: Assignment) -> float | None:
            with self._books.lock:
                row = journal.rows[str(assignment["trial"])]
                repeats = journal.repeats("search", row.point)
                return journal.score_of(repeats) if journal.is_decided(repeats) else None

        first = [self._assignment(row) for row in rows]
        return Suggestions(self._space, first, evaluated, points, on_point, score_of, repeats_due)


def _local_folder(storage: str) -> Path:
    if "://" in storage and not storage.startswith("file://"):
        raise UsageError(
            "a search keeps its files in a folder",
            given=f"--storage {storage}",
            allowed="a path that every node of the cluster reaches",
        )
    return Path(storage.removeprefix("file://")).expanduser().absolute()
