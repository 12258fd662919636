"""How the loop talks to whoever runs it: a port for what happened, a control for what is wanted.

Under Ray the port is an actor on a safe node; `FolderPort` writes the run's folder directly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from elastic_kfac.state.run_folder import RunFolder

if TYPE_CHECKING:
    from elastic_kfac.training.rank import RankTrainer

Row = Mapping[str, Any]


class RunPort(Protocol):
    """Called on rank 0 only, but for `watch`."""

    def watch(self, trainer: RankTrainer) -> None:
        """The trainer whose run this is about; called on every rank, before anything else."""
        ...

    def metrics(self, row: Row) -> None:
        """A row of `metrics.jsonl`."""
        ...

    def event(self, row: Row) -> None:
        """A row of `events.jsonl`; the loop fills `time`, `kind` and `step`."""
        ...

    def progress(self, row: Row) -> None:
        """Every committed step; cheap, for a live line."""
        ...

    def last_step(self) -> int:
        """The last step that `progress` reported before this attempt; 0 when there is none."""
        ...

    def rewound(self, step: int, lost_steps: int) -> None:
        """The run goes on from `step`; `lost_steps` committed steps will be computed again."""
        ...


class Control(Protocol):
    """Polled by every rank at every step."""

    def stop_reason(self) -> str | None:
        """Why this rank should park at the next boundary; None to go on. Returns at once."""
        ...


class KeepGoing:
    """A control that never stops a run."""

    def stop_reason(self) -> str | None:
        return None


class FolderPort:
    """Writes rows into a run's folder, for runs without Ray and for tests."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.steps_redone = 0

    def watch(self, trainer: RankTrainer) -> None:
        return None

    def metrics(self, row: Row) -> None:
        self.folder.append_metrics([row])

    def event(self, row: Row) -> None:
        self.folder.append_events([row])

    def progress(self, row: Row) -> None:
        return None

    def last_step(self) -> int:
        # From the file, because the rank 0 of another attempt or world may have written it.
        return max((int(row.get("step", 0)) for row in self.folder.metrics()), default=0)

    def rewound(self, step: int, lost_steps: int) -> None:
        self.folder.rewind_metrics(step)
        self.steps_redone += lost_steps


class SilentPort:
    """Tells nobody: the port of ranks other than 0."""

    def watch(self, trainer: RankTrainer) -> None:
        return None

    def metrics(self, row: Row) -> None:
        return None

    def event(self, row: Row) -> None:
        return None

    def progress(self, row: Row) -> None:
        return None

    def last_step(self) -> int:
        return 0

    def rewound(self, step: int, lost_steps: int) -> None:
        return None


def event_row(kind: str, step: int, **details: Any) -> dict[str, Any]:
    """A row of `events.jsonl` that happened now."""
    return {"time": time.time(), "kind": kind, "step": step, **details}
