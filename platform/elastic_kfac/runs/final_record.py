"""The final record of a run: `ledger.parquet` and the training columns of `result.json`."""

from __future__ import annotations

from typing import Any

import numpy as np

from elastic_kfac.config import Config
from elastic_kfac.observability.quality import target_columns
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.ledger import ROW, Rows, from_parquet, to_parquet
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.loop import Outcome


def read_ledger(folder: RunFolder) -> Rows:
    """The ledger of a run: `ledger.parquet` after its end, that of its last checkpoint before.

    A run that goes on after an end has checkpoints that are newer than the file.
    """
    rows = np.empty(0, ROW)
    if folder.storage.exists("ledger.parquet"):
        rows = from_parquet(folder.storage.read("ledger.parquet"))
    store = CheckpointStore(folder.uri)
    if max(store.steps(), default=0) <= max(rows["step"], default=0):
        return rows
    state = store.load_latest()
    newer = rows if state is None else state.ledger.rows(folder.storage)
    return newer if len(newer) > len(rows) else rows


def compact_ledger(folder: RunFolder) -> int:
    """Writes `ledger.parquet` from the last checkpoint's segments and tail.

    Returns:
        The number of rows.
    """
    state = CheckpointStore(folder.uri).load_latest()
    rows = np.empty(0, ROW) if state is None else state.ledger.rows(folder.storage)
    folder.storage.write("ledger.parquet", to_parquet(rows))
    return len(rows)


def result_row(config: Config, outcome: Outcome) -> dict[str, Any]:
    """The columns of `result.json` that the training loop provides."""
    progress = outcome.progress
    return {
        "status": outcome.status,
        "steps": progress.step,
        "epochs": outcome.fractional_epoch,
        "samples_committed": progress.samples_committed,
        **target_columns(
            outcome.metric,
            best=progress.best_value,
            target=None if config.train.goal is None else config.train.goal.value,
            time_s=progress.time_to_target_s,
            train_time_s=progress.train_time_to_target_s,
        ),
        "train_time_s": progress.train_time_s,
        "computation_s": progress.computation_s,
        "communication_s": progress.communication_s,
        "hessian_s": progress.hessian_s,
        "worker_seconds": progress.worker_seconds,
        "gpu_seconds": progress.gpu_seconds,
        "final_state_sha256": outcome.state_sha256,
        "world_sizes": list(outcome.world_sizes),
        "resizes": max(0, len(outcome.world_sizes) - 1),
        "steps_redone": 0,
    }
