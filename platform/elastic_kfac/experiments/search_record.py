"""Records in the trial table what Ray Tune reports about the trials of a search."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Callback as RayTuneCallback
from ray.tune import Stopper
from ray.tune.stopper import NoopStopper

from elastic_kfac.errors import RunError
from elastic_kfac.experiments.search_folder import SearchFolder
from elastic_kfac.experiments.search_plan import SearchPlan
from elastic_kfac.experiments.search_trial import read_extras
from elastic_kfac.experiments.trials import (
    FAILED,
    FINISHED,
    PENDING,
    PRUNED,
    RUNNING,
    STOPPED,
    Trial,
)
from elastic_kfac.observability.quality import reached_s, shown_quality
from elastic_kfac.state.run_folder import RunFolder


class SearchRecord:
    """Keeps a search's folder up to date; called by Ray Tune's thread and by the driver's."""

    def __init__(
        self,
        folder: SearchFolder,
        plan: SearchPlan,
        broker: Any,
        say: Callable[[str], None],
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`broker` is the handle of the search's `ResourceBroker`; `on_change` follows every write."""
        self.lock = threading.RLock()
        self.interrupted = threading.Event()
        self.why_interrupted = "interrupted"
        self._folder = folder
        self._space = folder.space
        self._table = folder.trials
        self._plan = plan
        self._broker = broker
        self._say = say
        self._beaten: dict[str, str] = {}
        """Why trials that are being stopped cannot win."""
        self._problem: OSError | None = None
        self._on_change = on_change

    def on_start(self, trial_id: str) -> None:
        """A trial's process runs, for the first time or again."""
        with self.lock:
            trial = self._table[trial_id]
            trial.status, trial.reason = RUNNING, ""
            trial.numbers.setdefault("started", time.time())
            trial.run_folder = f"trials/{trial_id}"
            self.write()

    def on_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A trial evaluated, or ended."""
        with self.lock:
            trial = self._table[trial_id]
            trial.note(
                result,
                *("best_value", "steps", "train_time_s", "cpu_seconds", "peak_memory_bytes"),
            )
            done = float(result.get(self._space.progress_measure) or 0.0)
            trial.fraction = min(1.0, done / self._space.limit)
            parent = str(result.get("parent") or "")
            if parent not in ("", trial.parent):
                self._say(f"{trial_id} continues the state of {parent}")
            trial.parent = parent
            perturbed = dict(result.get("values") or {})
            known = {k: perturbed.get(k, v) for k, v in trial.parameters.items()}
            trial.parameters = known
            self.write()

    def is_beaten(self, result: Mapping[str, Any]) -> bool:
        """Whether a trial that has just missed the target at an evaluation is to stop, because a finished
        one has beaten it."""
        with self.lock:
            trial = self._table.get(str(result.get("trial")))
            if trial is None or trial.ended or result.get("ended"):
                return False
            why = self._plan.why_beaten(trial, result)
            if why is not None:
                self._beaten[trial.id] = why
            return why is not None

    def on_end(self, trial_id: str, result: Mapping[str, Any], *, crash: str | None = None) -> None:
        """A trial has ended; its last result has the cause (no cause: the scheduler stopped it)."""
        with self.lock:
            trial = self._table[trial_id]
            if trial.ended:
                return
            self.on_result(trial_id, result)
            how, cause = str(result.get("ended") or ""), str(result.get("cause") or "")
            if crash is not None:
                known = read_extras(self._folder.run_folder(trial_id)).get("cause")
                trial.status, trial.reason = FAILED, str(known or crash)
                self._broker.leave.remote(trial_id)
            elif how == FAILED:
                trial.status, trial.reason = FAILED, cause
            elif how in ("target", "budget"):
                trial.status = FINISHED
                trial.reason = "" if how == "target" else "the budget is used up"
            elif self.interrupted.is_set() or how == "interrupted":
                trial.status, trial.reason = PENDING, cause or self.why_interrupted
            elif trial_id in self._beaten:
                trial.status, trial.reason = PRUNED, self._beaten.pop(trial_id)
            else:
                trial.status = STOPPED
                trial.reason = f"{self._space.scheduler.name}: others were better at the same point"
            if trial.ended:
                # A clock that was set back does not give a trial a negative duration.
                trial.numbers["ended"] = max(time.time(), trial.numbers.get("started", 0.0))
                self._read_result(trial)
                self._say(self._line(trial))
                self._plan.prune()
            self.write()
            if not self._space.keep_states:
                # A stopped trial is still saving its state.
                self._folder.drop_states(FINISHED)

    def write(self) -> None:
        """Writes the files, and updates how many trials wait for workers."""
        self._broker.set_waiting.remote(self._plan.waiting())
        try:
            self._folder.write()
        except OSError as error:
            # The next write holds everything again; `close` does not let it pass.
            if self._problem is None:
                self._say(f"warning: {self._folder.folder} cannot be written: {error}")
            self._problem = error
        else:
            self._problem = None
        self._on_change()

    def settle(self) -> None:
        """Reads the results of stopped trials again: they save their state after they were stopped."""
        with self.lock:
            for trial in self._table.values():
                if trial.status in (STOPPED, PRUNED) and trial.run_folder:
                    self._read_result(trial)
            self.write()
            if not self._space.keep_states:
                self._folder.drop_states(FINISHED, STOPPED, PRUNED)

    def close(self) -> None:
        """Leaves unfinished trials to the next call."""
        with self.lock:
            for trial in self._table.values():
                if trial.status == RUNNING:
                    trial.status, trial.reason = PENDING, self.why_interrupted
            self.settle()
            if self._problem is not None:
                raise RunError(
                    "the record of the search lacks its last changes",
                    given=self._folder.folder,
                    change=f"{self._problem}; with room the same --name continues",
                ) from None

    def _read_result(self, trial: Trial) -> None:
        """Takes over the results that the run itself has recorded."""
        folder = self._folder.run_folder(trial.id)
        result = RunFolder(folder).result() or {}
        seconds = {
            "train_time_to_accuracy_s": reached_s(result),
            "time_to_accuracy_s": result.get("time_to_target_s", result.get("time_to_accuracy_s")),
            "best_value": result.get("best_value", result.get("best_accuracy")),
        }
        trial.note(
            {**result, **seconds},
            *("train_time_to_accuracy_s", "time_to_accuracy_s", "steps", "train_time_s"),
            *("worker_seconds", "best_value"),
        )
        trial.note(read_extras(folder), "cpu_seconds", "peak_memory_bytes")
        trial.reached = reached_s(result) is not None
        if trial.reached and trial.status in (STOPPED, PRUNED):
            # It reached the target before the decision to stop it came.
            trial.status, trial.reason = FINISHED, ""
        self._plan.note_model(trial)
        known = {**result, "cpu_seconds": trial.numbers.get("cpu_seconds")}
        if (emulator := self._plan.emulator) is not None:
            known["emulated_step_s"] = emulator.step_seconds(self._folder.config_of(trial))
        trial.numbers.pop("objective", None)
        trial.note({"objective": self._space.objective.value_of(known)}, "objective")
        if trial.status == FAILED:
            trial.reached = False
        self._plan.settle_shared(trial)

    def _line(self, trial: Trial) -> str:
        objective, best = self._space.objective, trial.numbers.get("best_value")
        value = trial.numbers.get("objective")
        target, name = objective.shown_target, objective.goal.metric
        parts = []
        if trial.status != FAILED and value is not None:
            parts.append(f"{target} in {value:.4g} {objective.unit}")
        elif trial.status != FAILED and best is not None:
            shown = shown_quality(name, best)
            parts.append(f"best {objective.quality.label} {shown} (target {target})")
        parts += [trial.reason] if trial.reason else []
        return f"{trial.id} {trial.status}" + (f": {'; '.join(parts)}" if parts else "")


class TuneCallback(RayTuneCallback):
    """Ray Tune's events, by the search's own trial ids."""

    def __init__(self, record: SearchRecord) -> None:
        self._record = record

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record.on_start(trial_name(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._record.on_result(trial_name(trial), result)
        if result.get("ended"):
            self._record.on_end(trial_name(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._record.on_end(trial_name(trial), trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        text = str(error).strip().splitlines() or ["its process died"]
        self._record.on_end(trial_name(trial), trial.last_result or {}, crash=text[-1])

    def get_state(self) -> dict[str, Any] | None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray Tune saves a copy with its own files, which is never read.
        return (RayTuneCallback, ())


class StopWhen(Stopper):
    """Ends a search once an event is set, and trials that are beaten, by their last result."""

    def __init__(
        self,
        event: threading.Event,
        is_beaten: Callable[[Mapping[str, Any]], bool] = lambda result: False,
    ) -> None:
        self._event, self._is_beaten = event, is_beaten

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._is_beaten(result)

    def stop_all(self) -> bool:
        return self._event.is_set()

    def __reduce__(self) -> tuple[Any, ...]:
        return (NoopStopper, ())


def trial_name(trial: Any) -> str:
    """The search's own id of one of Ray Tune's trials."""
    return str(trial.config["assignment"]["trial"])
