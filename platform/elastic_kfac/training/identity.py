"""What of a configuration a run keeps from its first step to its last."""

from __future__ import annotations

from elastic_kfac.config import Config
from elastic_kfac.errors import StateError
from elastic_kfac.kfac.state import IDENTITY
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.first_order import RATE_IN_MOMENTUM


def check_identity(state: TrainingState, config: Config, data_sha256: str) -> None:
    """Checks that a run can be continued from a state, which needs no tensors for that.

    Args:
        data_sha256: Hash of the training split's manifest.

    Raises:
        StateError: For the first setting that differs.
    """
    if state.data_sha256 != data_sha256:
        raise StateError(
            "the run's data set has changed: its manifest is not the one of the checkpoint",
            given=config.data.shards,
            change="restore the shards, or start a run under another name",
        )
    if state.seed != config.train.seed:
        raise StateError(
            "train.seed differs from the seed of the checkpoint",
            given=config.train.seed,
            allowed=state.seed,
        )
    kinds = state.config.get("optimizer", {}).get("name"), config.optimizer.name
    if kinds[0] and len({kind in RATE_IN_MOMENTUM for kind in kinds}) > 1:
        raise StateError(
            "the momentum of one of these optimizers contains the learning rate",
            given=f"optimizer.name={kinds[1]}",
            allowed=f"{kinds[0]}, as in the checkpoint",
        )
    saved = (state.skeleton.get("batch_size") or {}).get("policy", config.batch.policy)
    if saved != config.batch.policy:
        raise StateError(
            "batch.policy is not the one of the checkpoint",
            given=config.batch.policy,
            allowed=saved,
            change="continue with that policy, or start a run under another name",
        )
    options = (state.skeleton.get("kfac") or {}).get("options", {})
    uses_kfac = config.kfac.enabled or config.optimizer.name == "sharded_kfac"
    for name in IDENTITY if options and uses_kfac else ():
        if options.get(name) != getattr(config.kfac, name):
            raise StateError(
                f"the K-FAC state of the checkpoint was saved with another kfac.{name}",
                given=getattr(config.kfac, name),
                allowed=options.get(name),
                change="continue with that value, or start a run under another name",
            )
    if config.elastic.reproducible and state.config.get("elastic", {}).get("reproducible") is False:
        raise StateError(
            "the checkpoint was not written in the reproducible mode, so its bits depend on the "
            "world sizes it has seen",
            change="set elastic.reproducible=false, or start a run under another name",
        )
