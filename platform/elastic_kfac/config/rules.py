"""Rules between sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic_kfac.config.run import Config


GROWING = ("gg", "abs", "absa", "warmup")
"""Policies whose batch changes in the course of a run."""


def conflicts(config: Config) -> Iterator[str]:
    """Why sections do not go together, in one line each."""
    yield from _batch_conflicts(config)
    yield from _merge_conflicts(config)
    train, optimizer = config.train, config.optimizer
    if train.sync_batch_norm_group is not None and not train.sync_batch_norm:
        yield "train.sync_batch_norm_group needs train.sync_batch_norm=true"
    if optimizer.lr_schedule == "polynomial" and optimizer.decay_start_epoch >= (
        optimizer.decay_end_epoch or train.epochs
    ):
        yield (
            f"optimizer.decay_start_epoch={optimizer.decay_start_epoch:g} is not before the end "
            f"of the decay"
        )
    if optimizer.momentum_rule != "constant" and (
        config.batch.policy != "constant" or config.elastic.batch_policy == "keep_local"
    ):
        yield (
            f"optimizer.momentum_rule={optimizer.momentum_rule} follows a rate that follows the "
            "schedule only: it goes with batch.policy=constant and elastic.batch_policy=keep_global"
        )
    if config.sharded.gather == "gradients" and optimizer.momentum_rule != "constant":
        yield "optimizer.momentum_rule needs sharded.gather=weights"


def _batch_conflicts(config: Config) -> Iterator[str]:
    batch, base, policy = config.batch, config.train.global_batch_size, config.batch.policy
    elastic = config.elastic.batch_policy
    if elastic == "abs" and policy not in GROWING:
        yield (
            f"elastic.batch_policy=abs needs a batch that grows: batch.policy={policy} is not one "
            f"of {', '.join(GROWING)}"
        )
    if policy == "constant":
        return
    cap = batch.max_batch_size
    if cap is None:
        yield f"batch.policy={policy} needs batch.max_batch_size"
        return
    if cap < base:
        yield f"batch.max_batch_size={cap} is below train.global_batch_size={base}"
    if elastic == "keep_local":
        yield f"batch.policy={policy} owns the batch: elastic.batch_policy=keep_local cannot"
    schedule = config.optimizer.lr_schedule
    if policy == "gg" and not (schedule == "step" and config.optimizer.decay_epochs):
        yield (
            "batch.policy=gg grows at decay epochs: it needs optimizer.lr_schedule=step and "
            "optimizer.decay_epochs"
        )
    if policy == "fb" and config.optimizer.warmup_epochs > 0:
        yield "batch.policy=fb has its own batch.warmup_epochs: set optimizer.warmup_epochs=0"
    if policy == "warmup":
        epochs = [epoch for epoch, _ in batch.stages]
        sizes = [base, *(size for _, size in batch.stages)]
        if not epochs or epochs != sorted(epochs) or sizes != sorted(sizes) or sizes[-1] > cap:
            yield (
                "batch.policy=warmup needs batch.stages with ascending epochs and batches that "
                f"never fall, from {base} to {cap}"
            )
    if policy in ("abs", "absa"):
        if int(base * batch.growth) == base:
            yield f"batch.growth={batch.growth:g} leaves a batch of {base} as it is"
        has_factors = config.kfac.enabled and config.optimizer.name != "sharded_kfac"
        if batch.eigenvalue == "kfac" and not has_factors:
            yield "batch.eigenvalue=kfac needs kfac.enabled=true (and not optimizer sharded_kfac)"
    attack = config.adversarial.attack
    if policy == "abs" and attack != "none":
        yield f"batch.policy=abs has no adversarial samples: use absa with attack {attack}"
    if policy == "absa" and (attack == "none" or config.adversarial.fraction == 0):
        yield "batch.policy=absa needs adversarial.attack and adversarial.fraction above 0"


def steps_apart(config: Config) -> bool:
    """Whether ranks step on their own between merges, instead of summing gradients."""
    return config.elastic.merge == "distnewton" or config.elastic.merge_every_steps > 1


def _merge_conflicts(config: Config) -> Iterator[str]:
    if not steps_apart(config):
        return
    if config.elastic.merge == "distnewton":
        mode = "elastic.merge=distnewton"
    else:
        mode = f"elastic.merge_every_steps={config.elastic.merge_every_steps}"
    obstacles = {
        "kfac.enabled=true": config.kfac.enabled and config.optimizer.name != "sharded_kfac",
        "optimizer.name=sharded_kfac": config.optimizer.name == "sharded_kfac",
        "train.precision=fp16": config.train.precision == "fp16",
        "train.sync_batch_norm=true": config.train.sync_batch_norm,
        f"communication.algorithm={config.communication.algorithm}": (
            config.communication.algorithm != "native"
        ),
        f"communication.wire_format={config.communication.wire_format}": (
            config.communication.wire_format != "fp32"
        ),
        "elastic.reproducible=true": config.elastic.reproducible,
    }
    for setting, is_in_the_way in obstacles.items():
        if is_in_the_way:
            yield f"{mode} does not go with {setting}: its ranks exchange nothing between merges"


def reproducible_conflicts(config: Config) -> Iterator[str]:
    """Settings of these sections whose bits depend on the world size."""
    obstacles = {
        f"batch.policy={config.batch.policy}": config.batch.policy in ("abs", "absa"),
        f"adversarial.attack={config.adversarial.attack}": config.adversarial.attack != "none",
        f"mixing.mixup={config.mixing.mixup}": config.mixing.mixup != "none",
        "train.sync_batch_norm=true": config.train.sync_batch_norm,
    }
    yield from (setting for setting, is_in_the_way in obstacles.items() if is_in_the_way)
