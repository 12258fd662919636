"""Decides when a run that keeps failing has to end. Pure: no Ray, no clock."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_kfac.errors import ElasticKfacError

USAGE_EXIT_CODE = 2
"""Errors with this exit code are wrong usage, configuration or data: a retry cannot help."""


@dataclass(frozen=True)
class RankError:
    """An exception of one rank, in a form that every process can unpickle."""

    rank: int
    kind: str
    """Name of the exception's class."""
    line: str
    """For people."""
    traceback: str = ""
    exit_code: int = 1
    exception: Any = None
    """The exception itself where it is one of this package."""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> RankError:
        """`error`, raised by `rank`."""
        text = str(error).strip().splitlines()
        ours = error if isinstance(error, ElasticKfacError) else None
        return cls(
            rank=rank,
            kind=type(error).__name__,
            line=ours.line() if ours else f"{type(error).__name__}: {text[0] if text else ''}",
            traceback="".join(traceback.format_exception(error)),
            exit_code=ours.exit_code if ours else 1,
            exception=ours,
        )

    @property
    def is_collateral(self) -> bool:
        """Whether another rank's failure is the likely cause."""
        return self.kind == "CommunicationError"


class CrashLoopBreaker:
    """Ends a run after the same failure, `same_error_limit` times in a row without a new step.

    Lost workers and groups that cannot start have the larger `lost_worker_limit`: machines come and
    go for reasons that have nothing to do with the run.
    """

    def __init__(self, *, same_error_limit: int = 3, lost_worker_limit: int = 10) -> None:
        self.same_error_limit = same_error_limit
        self.lost_worker_limit = lost_worker_limit
        self.last_reason = ""
        self._reported: list[RankError] = []
        self._best_step = -1
        self._step_at_failure = -1
        self._signature: tuple[str, str] | None = None
        self._repeats = 0

    @property
    def reported_ranks(self) -> frozenset[int]:
        """Ranks of the present group that reported why they failed."""
        return frozenset(error.rank for error in self._reported)

    def reported(self, error: RankError) -> None:
        """A rank of the present group failed."""
        self._reported.append(error)

    def take_reports(self) -> list[RankError]:
        """What ranks of the present group reported, which then counts no more."""
        reported, self._reported = self._reported, []
        return reported

    def stepped(self, step: int) -> None:
        """A step was committed."""
        self._best_step = max(self._best_step, step)

    def judge(
        self, *, step: int, died: Sequence[int], errors: Mapping[int, str], lost_nodes: int
    ) -> RankError | None:
        """Judges the failure of the present group.

        Args:
            died: Ranks whose process ended without a report.
            lost_nodes: How many nodes of the group are dead.

        Returns:
            Why the run must end, or None to retry.
        """
        reported, self._reported = self._reported, []
        causes = [error for error in reported if not error.is_collateral]
        if causes:
            cause = causes[0]
            limit = 1 if cause.exit_code == USAGE_EXIT_CODE else self.same_error_limit
        else:
            cause = _lost(died, errors, lost_nodes, reported)
            limit = self.lost_worker_limit
        self.last_reason = cause.line
        signature = (cause.kind, cause.line)
        stuck = self._best_step <= self._step_at_failure
        self._repeats = self._repeats + 1 if stuck and signature == self._signature else 1
        self._signature = signature
        self._step_at_failure = max(self._step_at_failure, self._best_step, step)
        return cause if self._repeats >= limit else None


def _lost(
    died: Sequence[int], errors: Mapping[int, str], lost_nodes: int, reported: Sequence[RankError]
) -> RankError:
    if lost_nodes:
        plural = "s" if lost_nodes > 1 else ""
        return RankError(-1, "NodeLost", f"{lost_nodes} node{plural} lost")
    if died:
        ranks = ", ".join(str(rank) for rank in sorted(died))
        plural = "es" if len(died) > 1 else ""
        return RankError(died[0], "WorkerLost", f"worker process{plural} of rank {ranks} died")
    if reported:
        return reported[0]
    text = next(iter(errors.values()), "a worker group could not be started")
    return RankError(-1, "GroupFailed", text.splitlines()[0][:300])
