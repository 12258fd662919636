"""`result.json`, from the last outcome and the coordinator's view."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.config import Config
from elastic_kfac.config.train import Target
from elastic_kfac.errors import ElasticKfacError, RunError, StateError, UsageError
from elastic_kfac.observability.quality import main_value, target_columns
from elastic_kfac.runs.final_record import compact_ledger
from elastic_kfac.runs.history import number
from elastic_kfac.runs.resuming import check_resume
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import Row, RunFolder

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
    safe: str = ""
    """What of the run is safe, where it did not finish."""
    is_safe: bool = True
    """Whether every committed step is, with all rows."""

    @property
    def exit_code(self) -> int:
        """0 success; 1 the run failed, a requested fault never happened, or something is not safe;
        130 it was interrupted."""
        if self.status == "interrupted" and self.is_safe:
            return EXIT_INTERRUPTED
        return 0 if self.status == "finished" and self.is_safe and not self.unfired else 1


def resumes(folder: RunFolder, config: Config, name: str, display: Display) -> bool:
    """Whether a run has checkpoints to continue from; reports what there is.

    Writes nothing: a run's folder stays as it is until its newest checkpoint has accepted the
    configuration.

    Raises:
        UsageError: If the run is finished and has no checkpoint to continue from.
        StateError: If the checkpoint is one of another data set, seed or the like.
    """
    if folder.storage.exists("result.json") and folder.result() is None:
        display.say(f"warning: {folder.uri}/result.json is damaged; the run's end writes it anew")
    if CheckpointStore(folder.uri).steps():
        state = check_resume(folder, config)
        display.say(f"Run {name} exists in {folder.uri}: resuming it.")
        if state is not None and state.progress.epoch >= config.train.epochs:
            display.say(
                f"It has trained {state.progress.epoch} of train.epochs={config.train.epochs:g} "
                "epochs: raise that to train on."
            )
        return True
    if (folder.result() or {}).get("status") == "finished":
        raise UsageError(
            f"run {name} is finished, and its checkpoints are gone",
            given=folder.uri,
            change="use another --name, or delete the folder to train anew",
        )
    if folder.metrics():
        display.say(f"Run {name} exists in {folder.uri} without a checkpoint: it begins anew.")
    return False


def build_result(
    folder: RunFolder,
    view: RunView,
    *,
    interrupted: str | None,
    unfired: Sequence[str],
    goal: Target | None,
    failed: bool,
) -> RunResult:
    """Writes `ledger.parquet` and `result.json`; for a failed run from what the driver has seen.

    Nothing of a run whose state did not accept the configuration.

    Raises:
        RunError: If they cannot be written.
    """
    earlier = folder.result() or {}
    progress, found = view.progress, main_value(view.evaluation)
    metric = found[0] if found is not None else str(earlier.get("metric") or "accuracy")
    if goal is not None:
        metric = goal.metric
    # Of all calls for this run, not only of this one.
    changes = [row for row in folder.events() if row.get("kind") in CHANGES]
    seen = {
        "steps": progress.get("step", earlier.get("steps", 0)),
        "epochs": progress.get("epoch", earlier.get("epochs", 0)),
        "samples_committed": progress.get("samples", earlier.get("samples_committed", 0)),
        **target_columns(
            metric,
            best=found[2] if found is not None else earlier.get("best_value"),
            target=None if goal is None else goal.value,
            time_s=earlier.get("time_to_target_s"),
            train_time_s=earlier.get("train_time_to_target_s"),
        ),
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
        "resizes": sum(
            _amount(row, "from_world_size") not in (0, _amount(row, "to_world_size"))
            for row in changes
        ),
        "steps_redone": sum(int(_amount(row, "steps_redone")) for row in changes),
        "downtime_s": round(sum(_amount(row, "downtime_s") for row in changes), 3),
        "unfired_faults": list(unfired),
        "error": view.error.line if view.error is not None else None,
    }
    values.pop("reasons", None)
    is_safe, safe = _safe_part(folder, int(values["steps"] or 0), view.unwritten_rows)
    result = RunResult(status, folder.uri, values, tuple(unfired), safe, is_safe)
    if not view.is_accepted:
        return result
    try:
        with contextlib.suppress(StateError):
            compact_ledger(folder)
        folder.write_result(values)
    except OSError as error:
        cause = view.error.line if view.error is not None else error
        raise RunError(
            "the run's result cannot be written", given=folder.uri, change=f"{cause}; {safe}"
        ) from None
    return result


def _amount(row: Row, key: str) -> float:
    """A finite number of a row that an earlier call has written; 0 where it is damaged."""
    value = number(row, key)
    return value if value is not None and math.isfinite(value) else 0.0


def _safe_part(folder: RunFolder, step: int, unwritten_rows: int) -> tuple[bool, str]:
    """Whether everything up to `step` is on disk, and what is, in words."""
    newest = max(CheckpointStore(folder.uri).steps(), default=0)
    if newest >= step:
        line = f"the state of step {newest} is safe" if newest else "no step was committed"
    elif newest:
        line = f"the newest checkpoint is of step {newest}: the {step - newest} after it are lost"
    else:
        line = f"no checkpoint was written: all {step} steps are lost"
    if unwritten_rows:
        line += f"; {unwritten_rows} rows of its record are lost"
    return newest >= step and not unwritten_rows, line


def error_of(error: RankError, display: Display, *, change: str) -> ElasticKfacError:
    """The error that ended a run, as the command raises it; shows its traceback where that helps.

    Args:
        change: What of the run is safe; added where the run had begun.
    """
    ours = error.exception if isinstance(error.exception, ElasticKfacError) else None
    if error.traceback and (ours is None or error.exit_code == 1):
        display.say(error.traceback.rstrip())
    if ours is not None and ours.exit_code != 1:
        return ours
    if ours is not None:
        both = "; ".join(part for part in (ours.change, change) if part)
        return type(ours)(ours.what, given=ours.given, allowed=ours.allowed, change=both)
    rank = f" (rank {error.rank})" if error.rank >= 0 else ""
    return RunError(f"the run failed{rank}: {error.line}", change=change)


def _joined(earlier: Sequence[int], later: Sequence[int]) -> list[int]:
    joined = list(earlier)
    for size in later:
        if not joined or joined[-1] != size:
            joined.append(size)
    return joined
