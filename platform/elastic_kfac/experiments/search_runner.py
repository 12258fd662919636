"""Searches for the configuration that trains to an accuracy fastest; every trial is an elastic run."""

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

from elastic_kfac.cluster.ray.connection import environment
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.ray.nodes import room_for_workers, start_actor
from elastic_kfac.cluster.run.progress import Display, ProgressLine
from elastic_kfac.cluster.run.result import EXIT_INTERRUPTED
from elastic_kfac.errors import RunError
from elastic_kfac.experiments.engine import Engine, session
from elastic_kfac.experiments.resource_broker import ResourceBroker
from elastic_kfac.experiments.search_folder import (
    SearchFolder,
    claimed_search,
    hardware_of,
    searches_folder,
)
from elastic_kfac.experiments.search_plan import SearchPlan
from elastic_kfac.experiments.search_record import SearchRecord, StopWhen, TuneCallback, trial_name
from elastic_kfac.experiments.search_space import SearchSpace
from elastic_kfac.experiments.search_trial import TrialRun, TrialSettings
from elastic_kfac.experiments.searcher import (
    Assignment,
    TrialSearcher,
    make_scheduler,
    param_space,
)
from elastic_kfac.experiments.trials import PRUNED, REFUSED, SHARED, Trial

STOP_TIMEOUT_S = 120.0
"""How long a stop signal waits for the trials to save their states."""

_ENVIRONMENT = {
    # Relative paths of a configuration are meant from where the command was given.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The folder of the search and TensorBoard are the only loggers.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class SearchResult:
    """How a call of `search` ended."""

    status: str
    """`finished` or `interrupted`."""
    folder: Path
    best: Trial | None
    trials: tuple[Trial, ...]

    @property
    def exit_code(self) -> int:
        """0 with a best trial; 1 if no trial finished; 130 after an interruption."""
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
    display: Display | None = None,
    rank_function: str | None = None,
) -> SearchResult:
    """Searches until all trials have ended; the same `name` continues an earlier call.

    Args:
        name: Name of the search; its folder is `<storage>/<name>`.
        write_page: Writes `report.html` into the search's folder.
        address: Address of a Ray cluster; None starts one on this machine with a node per worker of
            every concurrent trial.
        cluster: An embedded cluster to use and to leave running; this process is connected to it.
        rank_function: `module:function` that runs one rank of a trial; None is the usual one.

    Raises:
        UsageError: If the search cannot work; nothing was started then.
        RunError: If Ray Tune itself failed; the same name continues.
    """
    # Warnings about files of Ray Tune's own loggers, which are off, and about its pace on a busy machine.
    for module in ("analysis.experiment_analysis", "utils.util"):
        logging.getLogger(f"ray.tune.{module}").setLevel(logging.ERROR)
    path = searches_folder(storage) / name
    with contextlib.ExitStack() as stack:
        line = display or ProgressLine(plain_interval_s=60.0)
        stack.callback(line.close)
        folder = stack.enter_context(claimed_search(path, name, space, line.say))
        stack.enter_context(folder.tracking())
        stack.enter_context(environment(_ENVIRONMENT, user_wins=True))
        nodes = space.base.elastic.max_workers * space.max_concurrent
        signals = stack.enter_context(
            session(line, space.base, nodes=nodes, address=address, cluster=cluster)
        )
        elastic, per_worker = space.base.elastic, space.base.resources.of_a_worker()
        # An autoscaler may bring the first nodes only when trials ask for them.
        room = room_for_workers(per_worker) or elastic.max_workers
        slots = min(space.max_concurrent, max(1, room // elastic.min_workers))
        folder.hardware = hardware_of(ray.nodes())
        plan = SearchPlan(folder, room, line.say)
        plan.begin()
        engine = Engine(
            folder.trials, line, signals, lambda: write_page(folder.folder), slots=slots
        )
        broker = start_actor(ResourceBroker, slots, per_worker)
        stack.callback(ray.kill, broker)
        settings = TrialSettings(space, str(folder.folder), broker, rank_function)
        return _Search(folder, plan, engine, slots, settings).run()


class _Search:
    """One call of `search`, connected to a cluster; the source of its searcher's trials."""

    def __init__(
        self,
        folder: SearchFolder,
        plan: SearchPlan,
        engine: Engine,
        slots: int,
        settings: TrialSettings,
    ) -> None:
        self._folder, self._space = folder, folder.space
        self._plan = plan
        self._engine = engine
        self._slots = slots
        self._settings = settings
        self._say = engine.line.say
        self._record = SearchRecord(
            folder, plan, settings.broker, self._say, on_change=self._on_change
        )
        self._is_announced = False

    def run(self) -> SearchResult:
        """Runs what is left, stage by stage."""
        folder, space, signals = self._folder, self._space, self._engine.signals
        if folder.ended_before:
            self._say(
                f"Search {folder.name} exists: continuing it after {folder.ended_before} trials."
            )
        folder.status = "running"
        self._record.write()
        try:
            if space.perturbed:
                # Trials whose values change in training are only compared with each other.
                self._run_stage(("reference",), None)
                stages: tuple[str, ...] = ("search",)
            else:
                stages = ("reference", "search")
            wanted = True
            while wanted and signals.reason is None:
                self._run_stage(stages, make_scheduler(space, self._slots))
                # A first seed that was stopped may have reached the target before: known only now.
                wanted = bool(self._plan.add_repeats())
            best = folder.best()
            if signals.reason is None and space.confirm and best is not None:
                with self._record.lock:
                    self._plan.add_confirmation(best)
                self._run_stage(("confirm",), None)
        except BaseException:
            folder.status = "failed"
            raise
        else:
            folder.status = "interrupted" if signals.reason is not None else "finished"
            if folder.status == "finished" and not space.keep_states:
                folder.drop_tune_checkpoints()
        finally:
            self._record.close()
            self._engine.write_page()
        return SearchResult(
            folder.status, folder.folder, folder.best(), tuple(folder.trials.values())
        )

    # ---- trials for the searcher -----------------------------------------------------------

    def new_point(self, values: Mapping[str, Any]) -> list[Assignment]:
        """The first seed of a point that Optuna suggests."""
        with self._record.lock:
            number = self._space.num_trials - self._plan.points_left()
            trial = self._plan.add_point(number, values)
            self._record.write()
            return [] if trial.ended else [self._plan.assignment(trial)]

    def repeats_due(self) -> list[Assignment] | None:
        """The other seeds of points whose first has finished."""
        with self._record.lock:
            added = self._plan.add_repeats()
            if added:
                self._record.write()
            firsts = self._folder.first_seeds()
            some_may_come = self._space.repeats > 1 and not all(first.ended for first in firsts)
            open_ones = [self._plan.assignment(trial) for trial in added if not trial.ended]
            return open_ones if added or some_may_come else None

    def is_wanted(self, assignment: Assignment) -> bool:
        """Whether a planned trial is still to run."""
        with self._record.lock:
            return not self._folder.trials[str(assignment["trial"])].ended

    def score_of(self, assignment: Assignment) -> float | None:
        """The score of a trial's point."""
        with self._record.lock:
            return self._folder.score_of(self._folder.trials[str(assignment["trial"])])

    # ---- running ---------------------------------------------------------------------------

    def _on_change(self) -> None:
        self._engine.has_news = True
        self._engine.unplanned = self._plan.points_left()

    def _run_stage(self, stages: Sequence[str], scheduler: Any | None) -> None:
        is_population = "search" in stages and bool(self._space.perturbed)
        is_search = "search" in stages and not is_population
        if is_search:
            self._plan.add_repeats()
        trials = self._folder.trials.open(stages)
        points = self._plan.points_left() if is_search else 0
        if not trials and not points:
            return
        if not self._is_announced:
            self._is_announced = True
            most = f"{self._slots} at a time" if self._slots > 1 else "one after another"
            report = self._folder.folder / "report.html"
            self._say(f"Trials run {most}; to follow them: {report}")
        assignments = [self._plan.assignment(trial) for trial in trials]
        searcher = self._searcher(assignments, points) if is_search else None
        self._record.write()
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(TrialRun, settings=self._settings),
                # The head is where a driver is safe; its workers ask for resources themselves.
                {"CPU": 0, "node:__internal_head__": 0.001},
            ),
            param_space={} if searcher is not None else param_space(self._space, assignments),
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
                storage_path=str(self._folder.folder),
                stop=StopWhen(self._record.interrupted, self._record.is_beaten),
                callbacks=[TuneCallback(self._record), TBXLoggerCallback()],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_frequency=0, checkpoint_at_end=False
                ),
            ),
        )
        executor = _TuneExecutor(tuner, searcher, self._record, self._settings.broker, self._say)
        self._engine.run(executor)
        self._record.settle()
        executor.raise_failure()

    def _searcher(self, planned: Sequence[Assignment], points: int) -> TrialSearcher:
        evaluated = [
            (first.parameters, score)
            for first in self._folder.first_seeds()
            if first.status not in (PRUNED, REFUSED, SHARED)
            and (score := self._folder.score_of(first)) is not None
        ]
        return TrialSearcher(self._space, self, planned, evaluated, points)


class _TuneExecutor:
    """Ray Tune in a thread of its own."""

    def __init__(
        self,
        tuner: tune.Tuner,
        searcher: TrialSearcher | None,
        record: SearchRecord,
        broker: Any,
        say: Callable[[str], None],
    ) -> None:
        self._tuner = tuner
        self._searcher = searcher
        self._record = record
        self._broker = broker
        self._say = say
        self._failure: BaseException | None = None
        self._give_up: float | None = None
        self._thread = threading.Thread(target=self._fit, name="ray-tune", daemon=True)
        self._thread.start()

    def poll(self) -> bool:
        self._thread.join(0.2)
        if self._give_up is not None and (
            time.monotonic() > self._give_up or not ray.get(self._broker.live.remote())
        ):
            # From here on Ray Tune ends its actors, whatever they are doing.
            self._record.interrupted.set()
        return self._thread.is_alive()

    def stop(self, reason: str) -> None:
        self._say(f"{reason}: trials save their state and stop …")
        if self._searcher is not None:
            self._searcher.close()
        self._record.why_interrupted = f"interrupted by {reason}"
        ray.get(self._broker.stop.remote(self._record.why_interrupted))
        self._give_up = time.monotonic() + STOP_TIMEOUT_S

    def raise_failure(self) -> None:
        """Raises RunError if Ray Tune itself failed, unless it was interrupted."""
        if self._failure is None or self._record.interrupted.is_set():
            return
        text = str(self._failure).strip().splitlines() or [""]
        raise RunError(
            f"Ray Tune ended the search: {type(self._failure).__name__}: {text[-1]}",
            change="the same --name continues it",
        ) from self._failure

    def _fit(self) -> None:
        try:
            self._tuner.fit()
        except BaseException as error:
            self._failure = error
