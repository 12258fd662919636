"""Whether a run can be continued, judged from its newest checkpoint without its tensors."""

from __future__ import annotations

from elastic_kfac.config import Config
from elastic_kfac.data.manifest import open_named_split
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.identity import check_identity


def check_resume(folder: RunFolder, config: Config) -> TrainingState | None:
    """Checks that the newest checkpoint of a run can be continued as configured, before a cluster starts.

    A rank checks again what it restores, tensors included.

    Returns:
        The checkpoint without its tensors; None if there is none, or it is damaged.

    Raises:
        StateError: If it cannot.
        DataError: If the training split does not exist.
    """
    if (state := CheckpointStore(folder.uri).outline()) is not None:
        data = config.data
        split = open_named_split(data.shards, data.train_split, "data.train_split")
        check_identity(state, config, split.manifest_sha256)
    return state
