"""How a run follows its cluster: in place, or by restarts where it cannot be otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic_kfac.config import Config

RANK_FUNCTION = "elastic_kfac.training.loop:run_rank"
"""Runs one rank of a group that lives as long as its process group."""
MEMBER_FUNCTION = "elastic_kfac.training.in_place:run_member"
"""Runs one rank that stays while others come and go."""


def why_restarts(config: Config, member_function: str | None, *, logical_gpus: bool) -> str | None:
    """Why every change of the world restarts all workers although `elastic.in_place` is set.

    Args:
        member_function: As in `trainer.train`, like `logical_gpus`.

    Returns:
        A line for people; None if changes happen in place, or the configuration asks for restarts.
    """
    if not config.elastic.in_place:
        return None
    if member_function is None:
        return "the rank function of this run has no form for members"
    if config.plan.decomposers:
        return f"plan.decomposers={config.plan.decomposers} belong to workers that are started together"
    uses_nccl = config.resources.use_gpu and not logical_gpus and config.train.backend != "gloo"
    if uses_nccl and config.elastic.max_workers > 1:
        return "NCCL between GPUs (train.backend=gloo changes in place)"
    return None
