"""Callbacks of a run: where a step has got to, and the rows that rank 0 reports.

Whoever follows a run (the run folder, the coordinator under Ray, telemetry, the log, a test's faults)
implements `Callback`; `Callbacks` composes several. Whether to stop is a question with an answer, not an
event, so it has a protocol of its own: `Control`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from elastic_kfac.errors import RunError
from elastic_kfac.state.recorder import Recorder
from elastic_kfac.state.run_folder import RunFolder

if TYPE_CHECKING:
    from elastic_kfac.communication.collectives import Communicator
    from elastic_kfac.state.state import Progress

Row = Mapping[str, Any]

Point = Literal[
    "step_begin",
    "backward_done",
    "factor_exchange",
    "gradients_exchanged",
    "factor_update",
    "decomposition",
    "preconditioned",
    "committed",
    "evaluation",
    "capture",
    "recovery",
]
"""Points of a run in the order of a step; the last three lie between steps. `factor_exchange`,
`factor_update` and `decomposition` only where they are due."""


class Trainer(Protocol):
    """What callbacks may read of the trainer of their rank."""

    communicator: Communicator
    """The present world's; replaced at every resize in place."""
    progress: Progress

    @property
    def fractional_epoch(self) -> float: ...


class Callback:
    """Follows a run; every method does nothing unless overridden.

    Methods run in the thread of the loop and must return quickly. An exception ends the rank's run.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Every rank: the trainer is built, nothing is restored yet."""

    def on_point(self, point: Point, step: int) -> None:
        """Every rank: the loop reaches `point` of `step`, which is being computed, or was committed
        last."""

    def on_step(self, row: Row) -> None:
        """Rank 0, every committed step: its loss, rates and times."""

    def on_metrics(self, row: Row) -> None:
        """Rank 0: a row of `metrics.jsonl`."""

    def on_event(self, row: Row) -> None:
        """Rank 0: a row of `events.jsonl`, complete with `time`, `kind` and `step`."""

    def on_rollback(self, step: int, lost_steps: int) -> None:
        """Rank 0: the run continues from `step`; `lost_steps` committed steps are computed again."""

    def last_step(self) -> int:
        """Rank 0, before it continues: the last step ever reported for this run; 0 if unknown."""
        return 0

    def wall_time_s(self) -> float:
        """Rank 0, before it continues: the time in which this run existed so far; 0 if unknown."""
        return 0.0


class Callbacks(Callback):
    """Several callbacks, called in their order."""

    def __init__(self, *callbacks: Callback) -> None:
        self._callbacks = callbacks

    def on_start(self, trainer: Trainer) -> None:
        for callback in self._callbacks:
            callback.on_start(trainer)

    def on_point(self, point: Point, step: int) -> None:
        for callback in self._callbacks:
            callback.on_point(point, step)

    def on_step(self, row: Row) -> None:
        for callback in self._callbacks:
            callback.on_step(row)

    def on_metrics(self, row: Row) -> None:
        for callback in self._callbacks:
            callback.on_metrics(row)

    def on_event(self, row: Row) -> None:
        for callback in self._callbacks:
            callback.on_event(row)

    def on_rollback(self, step: int, lost_steps: int) -> None:
        for callback in self._callbacks:
            callback.on_rollback(step, lost_steps)

    def last_step(self) -> int:
        return max((callback.last_step() for callback in self._callbacks), default=0)

    def wall_time_s(self) -> float:
        return max((callback.wall_time_s() for callback in self._callbacks), default=0.0)


class FolderWriter(Callback):
    """Writes rows into a run's folder, for runs without Ray."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.steps_redone = 0
        self._recorder = Recorder(folder)

    def close(self) -> None:
        """Writes what is left.

        Raises:
            RunError: If it cannot be written.
        """
        if count := self._recorder.close():
            raise RunError(f"{count} rows cannot be written", given=self.folder.uri)

    def on_metrics(self, row: Row) -> None:
        self._recorder.metrics([row])

    def on_event(self, row: Row) -> None:
        self._recorder.events([row])

    def on_rollback(self, step: int, lost_steps: int) -> None:
        self._recorder.rewind(step)
        self.steps_redone += lost_steps

    def last_step(self) -> int:
        # From the file: the rank 0 of another attempt or world may have written it.
        return max((int(row.get("step", 0)) for row in self.folder.metrics()), default=0)

    def wall_time_s(self) -> float:
        rows = self.folder.metrics()
        return max((float(row.get("wall_time_s") or 0.0) for row in rows), default=0.0)


class Control(Protocol):
    """Source of stop requests; polled by every rank at every step."""

    def stop_reason(self) -> str | None:
        """Why this rank should stop at the next step boundary; None to continue. Must not block."""
        ...


class KeepGoing:
    """Never asks to stop."""

    def stop_reason(self) -> str | None:
        return None


def event_row(kind: str, step: int, **details: Any) -> dict[str, Any]:
    """A row of `events.jsonl` that happened now."""
    return {"time": time.time(), "kind": kind, "step": step, **details}
