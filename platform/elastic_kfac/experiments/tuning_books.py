"""What becomes of the trials of a search, as Ray Tune tells it, written down at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback as TuneCallback

from elastic_kfac.experiments.emulation import Emulator
from elastic_kfac.experiments.objective import objective_value
from elastic_kfac.experiments.search_space import METRICS
from elastic_kfac.experiments.tuning_journal import Journal, TrialRow
from elastic_kfac.experiments.tuning_trial import read_books
from elastic_kfac.state.run_folder import RunFolder


class SearchBooks:
    """Keeps a journal up to date; called by Ray Tune's thread and by the driver's."""

    def __init__(
        self,
        journal: Journal,
        say: Callable[[str], None],
        write_page: Callable[[Path], object],
        emulator: Emulator | None = None,
    ) -> None:
        self.lock = threading.RLock()
        self.interrupted = threading.Event()
        self.why_interrupted = "interrupted"
        self.desk: Any = None
        """Handle of the `SearchDesk`, once there is one."""
        self._journal = journal
        self._space = journal.space
        self._say = say
        self._write_page = write_page
        self._emulator = emulator
        self._reported = 0.0
        self._has_news = False

    def points_left(self) -> int:
        """Points that Optuna may still think of; others are planned before the search begins."""
        if self._space.searcher.name != "optuna":
            return 0
        return self._space.num_trials - len(self._journal.first_seeds())

    def started(self, trial_id: str) -> None:
        """A trial's process runs, for the first time or again."""
        with self.lock:
            row = self._journal.rows[trial_id]
            row.status, row.reason = "running", ""
            row.numbers["started"] = row.numbers.get("started") or time.time()
            row.run_folder = f"trials/{trial_id}"
            self.tell_waiting()
            self.note()

    def heard(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A trial evaluated, or ended."""
        with self.lock:
            row = self._journal.rows[trial_id]
            for name in (
                "best_accuracy",
                "steps",
                "train_time_s",
                "cpu_seconds",
                "peak_memory_bytes",
            ):
                if result.get(name) is not None:
                    row.numbers[name] = float(result[name])
            parent = str(result.get("parent") or "")
            if parent not in ("", row.parent):
                self._say(f"{trial_id} continues the state of {parent}")
            row.parent = parent
            self._follow_perturbation(row, result)
            self.note()

    def ended(self, trial_id: str, result: Mapping[str, Any], *, crash: str | None = None) -> None:
        """A trial is over; why, is in its last result (nothing there: the scheduler stopped it)."""
        with self.lock:
            row = self._journal.rows[trial_id]
            if row.is_final:
                return
            self.heard(trial_id, result)
            how, cause = str(result.get("ended") or ""), str(result.get("cause") or "")
            if crash is not None:
                known = read_books(self._journal.folder / "trials" / trial_id).get("cause")
                row.status, row.reason = "failed", str(known or crash)
                self.desk.leave.remote(trial_id)
            elif how == "failed":
                row.status, row.reason = "failed", cause
            elif how in ("target", "budget"):
                row.status = "finished"
                row.reason = "" if how == "target" else "the budget is used up"
            elif self.interrupted.is_set() or how == "interrupted":
                row.status, row.reason = "pending", cause or self.why_interrupted
            else:
                row.status = "stopped"
                row.reason = f"{self._space.scheduler.name}: others were better at the same point"
            if row.is_final:
                row.numbers["ended"] = time.time()
                self._read_result(row)
                self._say(self._line(row))
            self.tell_waiting()
            self.note()

    def _follow_perturbation(self, row: TrialRow, result: Mapping[str, Any]) -> None:
        for key, value in (result.get("values") or {}).items():
            if key in row.parameters:
                row.parameters[key] = value

    def _read_result(self, row: TrialRow) -> None:
        """What the run's own books say at its end."""
        folder = self._journal.folder / "trials" / row.trial_id
        result = RunFolder(folder).result() or {}
        books = read_books(folder)
        for name in (
            "train_time_to_accuracy_s",
            "time_to_accuracy_s",
            "steps",
            "train_time_s",
            "worker_seconds",
            "best_accuracy",
        ):
            if result.get(name) is not None:
                row.numbers[name] = float(result[name])
        for name in ("cpu_seconds", "peak_memory_bytes"):
            if books.get(name) is not None:
                row.numbers[name] = float(books[name])
        row.reached = result.get("train_time_to_accuracy_s") is not None
        if row.reached and row.status == "stopped":
            # It had arrived before the scheduler's word did.
            row.status, row.reason = "finished", ""
        merged = {**result, "cpu_seconds": row.numbers.get("cpu_seconds")}
        if self._emulator is not None:
            merged["emulated_step_s"] = self._emulator.step_seconds(self._journal.config_of(row))
        row.numbers["objective"] = objective_value(self._space.objective, merged)
        if row.status == "failed":
            row.reached = False

    def _line(self, row: TrialRow) -> str:
        objective = self._space.objective
        accuracy = row.numbers.get("best_accuracy")
        parts = [f"{row.trial_id} {row.status}"]
        if row.status == "failed":
            parts.append(row.reason)
        elif row.numbers.get("objective") is not None:
            unit = METRICS[objective.metric]
            parts.append(
                f"{objective.target_accuracy:.4g} in {row.numbers['objective']:.4g} {unit}"
            )
        elif accuracy is not None:
            parts.append(f"best accuracy {accuracy:.2%} (target {objective.target_accuracy:.4g})")
        if row.reason and row.status != "failed":
            parts.append(row.reason)
        return ": ".join(parts[:1]) + (f": {'; '.join(parts[1:])}" if parts[1:] else "")

    def tell_waiting(self) -> None:
        """Has the desk know how many trials will still want a share."""
        rows = self._journal.rows.values()
        waiting = sum(row.status == "pending" for row in rows)
        if self._space.perturbed:
            # Members of a population take turns.
            waiting = sum(row.stage != "confirm" and not row.is_final for row in rows) - 1
        # Further seeds of a point take the place that their first one leaves.
        waiting += self.points_left()
        self.desk.set_waiting.remote(max(0, waiting))

    def note(self) -> None:
        """Writes the files; the report follows."""
        self._journal.write()
        self._has_news = True

    def report_news(self, interval_s: float = 5.0) -> None:
        """Writes the report if something has changed, but not all the time."""
        if self._has_news and time.monotonic() - self._reported > interval_s:
            self._reported = time.monotonic()
            self._has_news = False
            self._write_report()

    def settle(self) -> None:
        """Reads again what became of stopped trials: they had not parked yet when they were stopped."""
        with self.lock:
            for row in self._journal.rows.values():
                if row.status == "stopped":
                    self._read_result(row)
            self.note()

    def close(self) -> None:
        """The search has ended, or this call of it."""
        with self.lock:
            for row in self._journal.rows.values():
                if row.status == "running":
                    row.status, row.reason = "pending", self.why_interrupted
            self.settle()
        self._write_report()

    def _write_report(self) -> None:
        try:
            self._write_page(self._journal.folder)
        except Exception as error:
            # The search goes on; `elastic-kfac report` can be called at any time.
            self._say(f"the report could not be written: {type(error).__name__}: {error}")


class StopWhen(tune.Stopper):
    """Ends a search when it is told to."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._event.is_set()

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray Tune keeps a copy of it beside its own files; nobody reads that one.
        return (StopWhen, (_Never(),))


class _Never:
    def is_set(self) -> bool:
        return False


class Listener(TuneCallback):
    """Ray Tune's events, by the search's own trial ids."""

    def __init__(self, books: SearchBooks) -> None:
        self._books = books

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._books.started(trial_name(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._books.heard(trial_name(trial), result)
        if result.get("ended"):
            self._books.ended(trial_name(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._books.ended(trial_name(trial), trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_error()
        text = str(error).strip().splitlines() or ["its process died"]
        self._books.ended(trial_name(trial), trial.last_result or {}, crash=text[-1])

    def get_state(self) -> dict[str, Any] | None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (TuneCallback, ())


def trial_name(trial: Any) -> str:
    """The search's own id of one of Ray Tune's trials."""
    return str(trial.config["assignment"]["trial"])
