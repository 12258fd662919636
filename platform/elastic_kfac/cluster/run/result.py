"""`result.json`, from the last outcome and the coordinator's view."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.errors import ElasticKfacError, RunError, StateError
from elastic_kfac.runs.final_record import compact_ledger
from elastic_kfac.state.run_folder import RunFolder

EXIT_INTERRUPTED = 130

CHANGES = ("start", "continue", "resize", "recovery")
"""Kinds of events after which a group steps."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    status: str
    """`finished`, `interrupted` or `failed`."""
    run_folder: str
    values: dict[str, Any]
    """The content of `result.json`."""
    unfired: tuple[str, ...] = ()
    """Requested faults that never happened."""

    @property
    def exit_code(self) -> int:
        """0 success; 1 the run failed or a requested fault never happened; 130 it was interrupted."""
        if self.status == "interrupted":
            return EXIT_INTERRUPTED
        return 0 if self.status == "finished" and not self.unfired else 1


def build_result(
    folder: RunFolder,
    view: RunView,
    *,
    interrupted: str | None,
    unfired: Sequence[str],
    target_accuracy: float | None,
    failed: bool,
) -> RunResult:
    """Writes `ledger.parquet` and `result.json`; for a failed run from what the driver has seen."""
    earlier = folder.result() or {}
    progress = view.progress
    # Of all calls for this run, not only of this one.
    changes = [row for row in folder.events() if row.get("kind") in CHANGES]
    seen = {
        "steps": progress.get("step", earlier.get("steps", 0)),
        "epochs": progress.get("epoch", earlier.get("epochs", 0)),
        "samples_committed": progress.get("samples", earlier.get("samples_committed", 0)),
        "best_accuracy": view.evaluation.get("eval_accuracy", earlier.get("best_accuracy")),
        "target_accuracy": target_accuracy,
        "time_to_accuracy_s": earlier.get("time_to_accuracy_s"),
        "train_time_to_accuracy_s": earlier.get("train_time_to_accuracy_s"),
        "worker_seconds": round(view.worker_seconds, 3),
        "gpu_seconds": None,
        "final_state_sha256": None,
        "world_sizes": _joined(earlier.get("world_sizes", []), view.world_sizes),
    }
    if interrupted is not None:
        status = "interrupted"
    else:
        status = "failed" if failed else "finished"
    values = {
        **seen,
        **(view.outcome or {}),
        "status": status,
        "resizes": sum(row["from_world_size"] not in (0, row["to_world_size"]) for row in changes),
        "steps_redone": sum(int(row["steps_redone"]) for row in changes),
        "downtime_s": round(sum(float(row["downtime_s"]) for row in changes), 3),
        "unfired_faults": list(unfired),
        "error": view.error.line if view.error is not None else None,
    }
    values.pop("reasons", None)
    with contextlib.suppress(StateError):
        compact_ledger(folder)
    folder.write_result(values)
    return RunResult(status, folder.uri, values, tuple(unfired))


def error_of(error: RankError, display: Display, *, change: str) -> ElasticKfacError:
    """The error that ended a run, as the command raises it; shows its traceback where that helps."""
    ours = error.exception if isinstance(error.exception, ElasticKfacError) else None
    if error.traceback and (ours is None or error.exit_code == 1):
        display.say(error.traceback.rstrip())
    if ours is not None:
        return ours
    rank = f" (rank {error.rank})" if error.rank >= 0 else ""
    return RunError(f"the run failed{rank}: {error.line}", change=change)


def _joined(earlier: Sequence[int], later: Sequence[int]) -> list[int]:
    joined = list(earlier)
    for size in later:
        if not joined or joined[-1] != size:
            joined.append(size)
    return joined
