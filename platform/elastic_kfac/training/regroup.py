"""Makes a process group, as often as the world changes, inside one living process."""

from __future__ import annotations

import gc
import sys
from datetime import timedelta

import torch.distributed as dist

# Optimizers import it, and default arguments of its functions would hold on to the group of that time
# for ever: before the first group there is none.
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
    """Leaves the old group, if there is one, and joins the group of `generation`.

    Members of a generation agree on its number, on `world_size` and on their ranks beforehand; the
    `store` lives outside of them, so that it survives any member. Destroying the old group first
    also wakes the peers that still wait in it for one that is gone.

    Raises:
        CommunicationError: If the members do not come together within `timeout_s`.
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
    """Destroys this process's group, if there is one.

    Its connections close, which wakes peers that wait in it, when the last reference to it is gone. A
    trainer that failed is garbage, but in cycles; a caller that still handles its error holds it.
    """
    if not dist.is_initialized():
        return
    group = dist.group.WORLD
    dist.destroy_process_group()
    if sys.getrefcount(group) > _OWN_REFERENCES:
        gc.collect()
