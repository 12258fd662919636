"""Replaces the process group of a living process whenever the world changes."""

from __future__ import annotations

import gc
import sys
from datetime import timedelta

import torch.distributed as dist

# Optimizers import it, and default arguments of its functions keep the group that exists at that time
# alive forever. Import it before the first group is created.
import torch.distributed.nn.functional  # noqa: F401

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError

_OWN_REFERENCES = 2
"""A local name and the argument of `getrefcount`."""


def regroup(
    generation: int,
    rank: int,
    world_size: int,
    store: dist.Store,
    *,
    backend: str = "gloo",
    timeout_s: float = 60.0,
) -> Communicator:
    """Destroys the old group, if there is one, and creates the group of `generation`. Collective.

    The members agree on `generation`, `world_size` and their ranks beforehand. The `store` is hosted
    outside the members, so it survives any of them. Destroying the old group first also wakes peers
    that still wait in it for a lost member.

    Raises:
        CommunicationError: If the members do not connect within `timeout_s` seconds.
    """
    leave()
    if world_size == 1:
        return Communicator.solo()
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"generation-{generation}", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        leave()
        raise CommunicationError(
            f"rank {rank} of {world_size} could not join generation {generation}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return Communicator.world()


def leave() -> None:
    """Destroys the group of this process, if there is one.

    Its connections close, which wakes peers that wait in it, once the last reference to it is gone. A
    failed trainer holds references in cycles, hence the collection; a caller that still handles the
    error holds one too, so call this outside the handler.
    """
    if not dist.is_initialized():
        return
    group = dist.group.WORLD
    dist.destroy_process_group()
    if sys.getrefcount(group) > _OWN_REFERENCES:
        gc.collect()
