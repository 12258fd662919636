"""One trial: an elastic run that Ray Tune starts, follows, stops, pauses and clones.

The trainable drives `trainer.train` in a thread of its actor, so that a trial is what `elastic-kfac
train` would run, and hands Tune one result per evaluation. Tune's checkpoint of a trial is a copy of
the run's own newest checkpoint, taken when all ranks have saved it: PB2 can give it to another trial,
whose ranks then restore it as they restore any state.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.result import TIMESTEPS_TOTAL

from elastic_kfac.cluster.ray.idle_workers import cpu_seconds
from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.mode import MEMBER_FUNCTION, RANK_FUNCTION
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.cluster.run.result import RunResult
from elastic_kfac.cluster.run.trainer import train
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import ElasticKfacError
from elastic_kfac.experiments import rounds
from elastic_kfac.experiments.resource_broker import TrialShare
from elastic_kfac.experiments.rounds import announce_round, round_after
from elastic_kfac.experiments.search_space import Objective, SearchSpace, from_log_scale
from elastic_kfac.observability.quality import is_worse, reached_s
from elastic_kfac.runs.signals import StopSignals
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import event_row

PERTURBED = "perturbed:"
"""Prefix of the keys of a Tune configuration that PB2 changes."""

EXTRAS = "tuning.json"
"""File of a trial's run folder with what the run does not record: CPU time, memory, cause of failure."""

_CLONED = ("checkpoints", "ledger", "metrics.jsonl", EXTRAS)
_END_TIMEOUT_S = 120.0
_USUAL = (RANK_FUNCTION, MEMBER_FUNCTION)


@dataclass(frozen=True)
class TrialSettings:
    """Settings that all trials of a search share."""

    space: SearchSpace
    folder: str
    """The experiment's folder."""
    broker: Any
    """Handle of the `ResourceBroker`."""
    rank_function: str | None = None
    """Replaces the usual one: members of a population wait for each other."""


class StopRequest(StopSignals):
    """A request to stop that comes from the search instead of a signal."""

    def __enter__(self) -> StopRequest:
        return self

    def ask(self, reason: str) -> None:
        """Makes the run save its state and end; the first reason counts."""
        self.reason = self.reason or reason


class TrialRun(tune.Trainable):
    """Ray Tune's view of a trial."""

    def setup(self, config: dict[str, Any], settings: TrialSettings) -> None:
        self._settings = settings
        self._live: _LiveRun | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end("its process is wanted for another trial")
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Trains up to the next evaluation, or the end."""
        if self._live is None:
            self._live = _LiveRun(
                self._settings, self._trial, self._config, in_rounds=bool(self._values)
            )
        result = self._live.next_result()
        # TensorBoard's horizontal axis.
        result = {**result, "trial": self._trial, "values": self._values}
        return {**result, TIMESTEPS_TOTAL: result.get("steps")}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Stops the run and copies what another trial needs to continue from here."""
        self._end("Ray Tune takes a checkpoint")
        target = Path(checkpoint_dir)
        for name in _CLONED:
            _copy(self._run_folder / name, target / name)
        (target / "trial.json").write_text(json.dumps({"trial": self._trial}))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Takes over another trial's state; a trial's own state is in its run folder already."""
        source = Path(checkpoint)
        donor = json.loads((source / "trial.json").read_text())["trial"]
        if donor == self._trial:
            return
        self._end("it continues another trial's state")
        folder = RunFolder(self._run_folder)
        folder.storage.delete("result.json")
        for name in _CLONED:
            folder.storage.delete(name)
            _copy(source / name, self._run_folder / name)
        rows = folder.metrics()
        step = int(rows[-1]["step"]) if rows else 0
        folder.append_events([event_row("cloned", step, parent=donor)])
        extras = read_extras(self._run_folder)
        write_extras(self._run_folder, {**extras, "parent": donor})

    def cleanup(self) -> None:
        self._end("Ray Tune stops it")

    @property
    def _run_folder(self) -> Path:
        return Path(self._settings.folder) / "trials" / self._trial

    def _begin(self, config: Mapping[str, Any]) -> None:
        assignment = config["assignment"]
        self._trial = str(assignment["trial"])
        space = self._settings.space
        point = dict(assignment["point"])
        for key, parameter in space.perturbed.items():
            if PERTURBED + key in config:
                point[key] = from_log_scale(parameter, float(config[PERTURBED + key]))
        is_member = bool(space.perturbed) and assignment["stage"] == "search"
        self._values = point if is_member else {}
        """Values that PB2 may have changed."""
        self._config = space.config(point, int(assignment["seed"]))

    def _end(self, reason: str) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.end(reason)


class _LiveRun:
    """A call of `train` under way, watched from the thread that Tune calls."""

    def __init__(
        self, settings: TrialSettings, trial: str, config: Any, *, in_rounds: bool = False
    ) -> None:
        self._settings = settings
        self._trial = trial
        self._config = config
        self._folder = Path(settings.folder) / "trials" / trial
        self._in_rounds = in_rounds
        self._stop = StopRequest()
        self._rows: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._display = _Watch(settings, self._stop, self._rows, read_extras(self._folder))
        self._result: RunResult | None = None
        self._error: BaseException | None = None
        self._last = _last_evaluation(RunFolder(self._folder), self._settings.space.objective)
        self._round_end = 0.0
        if in_rounds:
            self._announce_round()
        self._thread = threading.Thread(target=self._train, name="trial", daemon=True)
        self._thread.start()

    def next_result(self) -> dict[str, Any]:
        """The next evaluation, or how the run ended."""
        if self._in_rounds:
            # Asking for another result lets the ranks go on.
            self._announce_round()
        while True:
            with contextlib.suppress(queue.Empty):
                row = self._rows.get(timeout=0.1)
                best = self._better(self._last["best_value"], row["value"])
                self._last = {**row, "best_value": best}
                if self._is_the_end(row):
                    # The next row is the result of the run.
                    continue
                found = {**self._last, **self._display.extras(), "ended": "", "cause": ""}
                return {**found, "round_end": self._round_end} if self._in_rounds else found
            if not self._thread.is_alive() and self._rows.empty():
                return self._end_row()

    def _announce_round(self) -> None:
        space = self._settings.space
        end = round_after(float(self._last[space.progress_measure]), space.round_length)
        if end != self._round_end:
            announce_round(RunFolder(self._folder), space.progress_measure, end)
            self._round_end = end

    def _is_the_end(self, row: Mapping[str, Any]) -> bool:
        objective, epochs = self._settings.space.objective, self._config.train.epochs
        missed = is_worse(row["value"], objective.goal.value, objective.quality.direction)
        return not missed or row["epoch"] >= epochs - 1e-9

    @property
    def _better(self) -> Callable[[float, float], float]:
        return max if self._settings.space.objective.quality.direction == "max" else min

    def end(self, reason: str) -> None:
        """Stops the run with its state saved, and waits until it has released everything."""
        self._stop.ask(reason)
        self._thread.join(_END_TIMEOUT_S)

    def _train(self) -> None:
        broker = self._settings.broker
        reason = ray.get(broker.enter.remote(self._trial))
        if reason is not None:
            self._stop.ask(reason)
            return
        own, in_rounds = self._settings.rank_function, bool(self._settings.space.perturbed)
        usual = (rounds.RANK_FUNCTION, rounds.MEMBER_FUNCTION) if in_rounds else _USUAL
        rank_function, member_function = (own, None) if own else usual
        try:
            self._result = train(
                self._config,
                name=self._trial,
                storage=str(self._folder.parent),
                address="auto",
                progress=self._display,
                rank_function=rank_function,
                member_function=member_function,
                stop_signals=self._stop,
                share=TrialShare(broker, self._trial),
                # A trial outlives a killed search for a moment.
                wait_s=_END_TIMEOUT_S,
            )
        except BaseException as error:
            self._error = error
        finally:
            write_extras(self._folder, self._display.extras())
            with contextlib.suppress(Exception):
                ray.get(broker.leave.remote(self._trial))

    def _end_row(self) -> dict[str, Any]:
        row = {**self._last, **self._display.extras(), "done": True, "cause": ""}
        error = self._error
        if self._result is None and error is None:
            # The search was stopping when this trial was about to start.
            return {**row, "ended": "interrupted", "cause": str(self._stop.reason)}
        if self._result is None:
            text = error.line() if isinstance(error, ElasticKfacError) else repr(error)
            write_extras(self._folder, {**self._display.extras(), "cause": text})
            return {**row, "ended": "failed", "cause": text}
        values = self._result.values
        best = values.get("best_value", values.get("best_accuracy"))
        row["best_value"] = row["best_value"] if best is None else float(best)
        row["epoch"] = float(values.get("epochs") or row["epoch"])
        row["steps"] = int(values.get("steps") or 0)
        if reached_s(values) is not None:
            return {**row, "ended": "target"}
        if self._result.status == "finished" or self._stop.reason == _BUDGET:
            return {**row, "ended": "budget"}
        return {**row, "ended": "interrupted", "cause": str(self._stop.reason)}


_BUDGET = "the budget is used up"
_WORST = 1e30
"""A value that every evaluation is better than; searchers take no infinite ones."""


class _Watch(Display):
    """The display of a trial: passes evaluations on, and measures its processes."""

    def __init__(
        self,
        settings: TrialSettings,
        stop: StopRequest,
        rows: queue.SimpleQueue[dict[str, Any]],
        extras: Mapping[str, Any],
    ) -> None:
        self._settings = settings
        self._stop = stop
        self._rows = rows
        self._limit_s = settings.space.budget.train_seconds
        self._evaluated = -1
        self._asked = 0.0
        self._processes = ProcessMeter(
            float(extras.get("cpu_seconds") or 0.0), int(extras.get("peak_memory_bytes") or 0)
        )
        self._parent = str(extras.get("parent") or "")
        self._least_worker_seconds = float(extras.get("least_worker_seconds") or 0.0)
        self._seen: tuple[float, int] | None = None
        """Seconds of training and workers at the last look."""

    def update(self, view: RunView) -> None:
        """About five times a second."""
        self._processes.look(view)
        row = view.evaluation
        if row and int(row["step"]) != self._evaluated:
            self._evaluated = int(row["step"])
            self._rows.put(_evaluation(row, self._settings.space.objective.goal.metric))
        trained_s = float(view.progress.get("train_time_s") or 0.0)
        self._count_workers(trained_s, int(view.progress.get("world_size") or 0))
        if self._limit_s is not None and trained_s >= self._limit_s:
            self._stop.ask(_BUDGET)
        if time.monotonic() - self._asked > 0.5:
            self._asked = time.monotonic()
            reason = ray.get(self._settings.broker.stop_reason.remote())
            if reason is not None:
                self._stop.ask(reason)

    def _count_workers(self, trained_s: float, workers: int) -> None:
        """Adds what all workers together have trained at least since the last look."""
        before, last = self._seen or (trained_s, workers)
        self._least_worker_seconds += max(0.0, trained_s - before) * min(workers, last)
        self._seen = max(trained_s, before), workers  # steps that are redone count once

    def extras(self) -> dict[str, Any]:
        """The content of `EXTRAS`."""
        return {
            "least_worker_seconds": self._least_worker_seconds,
            "cpu_seconds": self._processes.cpu_seconds,
            "peak_memory_bytes": self._processes.peak_memory_bytes,
            "parent": self._parent,
        }


def _evaluation(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return {
        "value": float(row[f"eval_{metric}"]),
        "epoch": float(row["epoch"]),
        "steps": int(row["step"]),
        "train_time_s": float(row["train_time_s"]),
    }


def _last_evaluation(folder: RunFolder, objective: Objective) -> dict[str, Any]:
    """The last evaluation of an earlier call, or of the trial that a clone continues."""
    metric, is_max = objective.goal.metric, objective.quality.direction == "max"
    found = [_evaluation(row, metric) for row in folder.metrics() if f"eval_{metric}" in row]
    if not found:
        worst = 0.0 if metric == "accuracy" else (-_WORST if is_max else _WORST)
        return {"value": worst, "best_value": worst, "epoch": 0.0, "train_time_s": 0.0}
    values = [row["value"] for row in found]
    return {**found[-1], "best_value": max(values) if is_max else min(values)}


class ProcessMeter:
    """CPU seconds of all ranks and memory of the largest, from /proc.

    Only where every rank runs on this machine; a rank counts from its first steps to the last look
    before its end (imports are not counted).
    """

    def __init__(self, cpu_seconds: float = 0.0, peak_memory_bytes: int = 0) -> None:
        self._before = cpu_seconds
        self._peak = peak_memory_bytes
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._hosts: dict[str, str] = {}
        self._is_blind = False

    def look(self, view: RunView) -> None:
        """Reads the processes of the present group."""
        if view.state != "running" or self._is_blind:
            return
        for rank, pid in view.pids.items():
            if self._host(str(view.rank_nodes.get(rank))) != socket.gethostname():
                self._is_blind = True
                return
            seconds, peak = process_usage(pid)
            if seconds is not None:
                self._first.setdefault(pid, seconds)
                self._last[pid] = seconds
                self._peak = max(self._peak, peak)

    @property
    def cpu_seconds(self) -> float | None:
        """None where ranks run on other machines."""
        if self._is_blind:
            return None
        spent = sum(self._last[pid] - self._first[pid] for pid in self._last)
        return round(self._before + spent, 3)

    @property
    def peak_memory_bytes(self) -> int | None:
        """None where nothing was seen."""
        return None if self._is_blind or not self._peak else self._peak

    def _host(self, node_id: str) -> str:
        if node_id not in self._hosts:
            self._hosts = {n["NodeID"]: str(n["NodeManagerHostname"]) for n in ray.nodes()}
        return self._hosts.get(node_id, "")


def process_usage(pid: int) -> tuple[float | None, int]:
    """CPU seconds and largest resident memory [bytes] of a process of this machine."""
    seconds = cpu_seconds(pid)
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None, 0
    peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return seconds, int(peaks[0]) * 1024 if peaks else 0


def read_extras(folder: Path) -> dict[str, Any]:
    """The content of `EXTRAS`; empty where there is none."""
    try:
        return dict(json.loads((folder / EXTRAS).read_text()))
    except (OSError, ValueError, RecursionError):
        return {}


def write_extras(folder: Path, extras: Mapping[str, Any]) -> None:
    """Replaces `EXTRAS` of a run folder."""
    Storage(folder).write(EXTRAS, json.dumps(dict(extras)).encode())


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
