"""A run in this process, its only worker: no Ray; record, folder and hash are those of a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch

from elastic_kfac.cluster.ray.devices import device_of_task
from elastic_kfac.cluster.run.coordinator import RunCoordinator, RunView
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.messages import Message, Reporter
from elastic_kfac.cluster.run.progress import Display, ProgressLine
from elastic_kfac.cluster.run.result import RunResult, build_result, error_of, resumes
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.errors import UsageError
from elastic_kfac.observability.run_log import LogContext, begin_log, levels_of_this_process
from elastic_kfac.runs.final_record import result_row
from elastic_kfac.runs.signals import StopSignals
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.loop import run_rank

T = TypeVar("T")


def train_in_process(
    config: Config,
    *,
    name: str,
    storage: str = "./runs",
    progress: Display | None = None,
    stop_signals: StopSignals | None = None,
) -> RunResult:
    """`trainer.train` without a cluster; either continues what the other has begun.

    Raises:
        UsageError: If the run cannot work as configured, or needs more than one worker.
        RunError: If the run failed, with the cause.
    """
    if config.elastic.min_workers > 1:
        raise UsageError(
            "--local trains with one worker",
            given=f"elastic.min_workers={config.elastic.min_workers}",
            change="add --set elastic.min_workers=1, or drop --local",
        )
    levels = levels_of_this_process()
    if levels:
        begin_log(LogContext(name), levels)
    display = progress or ProgressLine()
    folder = RunFolder(f"{storage.rstrip('/')}/{name}")
    with contextlib.ExitStack() as stack:
        stack.callback(display.close)
        signals = stack.enter_context(stop_signals or StopSignals())
        stack.enter_context(folder.claimed(f"run {name}", display.say))
        device = device_of_task(config)
        resumed = resumes(folder, config, name, display)
        if not resumed:
            folder.write_config(config)
        signals.defer()
        record = _Record(folder, display, signals, config if resumed else None)
        store = CheckpointStore(
            folder.uri, keep=config.elastic.keep_checkpoints, on_warning=record.warn
        )
        stack.callback(store.close)
        torch.set_num_threads(config.train.torch_threads)
        pool = None
        if config.plan.decomposers:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(config.plan.decomposers, spawn)
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        error: RankError | None = None
        try:
            outcome = run_rank(
                config,
                Communicator.solo(),
                store=store,
                callback=record,
                control=record,
                device=device,
                pool=pool,
            )
            record.left({**result_row(config, outcome), "reasons": list(outcome.reasons)})
        except Exception as exception:
            error = RankError.of(0, exception)
        result = build_result(
            folder,
            replace(record.close(), error=error),
            interrupted=signals.reason,
            unfired=(),
            goal=config.train.goal,
            failed=error is not None,
        )
        if error is not None:
            raise error_of(error, display, change=result.safe)
    return result


class _Record(Reporter):
    """The run coordinator in this process, and the display in the place of a driver that polls it."""

    def __init__(
        self, folder: RunFolder, display: Display, signals: StopSignals, config: Config | None
    ) -> None:
        self._loop = asyncio.new_event_loop()
        # The thread that writes checkpoints reports as well.
        self._lock = threading.RLock()
        self._folder = folder
        self._coordinator = RunCoordinator(folder.uri, config=config)
        self._display, self._signals = display, signals
        self._seen_events = 0
        self._shown_at = float("-inf")
        self._call(self._coordinator.group_started({0: os.getpid()}, {0: ""}))
        self._attempt = self._call(self._coordinator.join(0))["attempt"]

    def send(self, message: Message) -> None:
        self._folder.check_claim()
        self._call(self._coordinator.record(self._attempt, [message]))
        if time.monotonic() - self._shown_at >= 0.2:
            self._shown_at = time.monotonic()
            self._show(self._call(self._coordinator.view(self._seen_events)))

    def last_step(self) -> int:
        return self._call(self._coordinator.last_step())

    def wall_time_s(self) -> float:
        return self._call(self._coordinator.wall_time())

    def stop_reason(self) -> str | None:
        return self._signals.reason

    def left(self, outcome: dict[str, Any]) -> None:
        """The loop has returned."""
        if self._signals.reason is not None:
            self._call(self._coordinator.stop(self._signals.reason))
        self._call(self._coordinator.rank_left(self._attempt, 0, outcome))

    def close(self) -> RunView:
        """Ends the record; returns the last view of the run."""
        view = self._call(self._coordinator.close())
        self._show(replace(view, events=view.events[self._seen_events :]))
        self._loop.close()
        return view

    def _show(self, view: RunView) -> None:
        self._seen_events = view.num_events
        self._display.update(view)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            return self._loop.run_until_complete(coroutine)
