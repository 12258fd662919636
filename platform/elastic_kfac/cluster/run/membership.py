"""How the ranks of a group meet: one process group for its life, or worlds that change in place."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from elastic_kfac.communication.collectives import Communicator
    from elastic_kfac.training.callbacks import Control
    from elastic_kfac.training.membership import Membership

MEMBER_TIMEOUT_S = 60.0
"""For collectives between members."""


class NeverAMember(Exception):
    """The run was drained or over before the members took this process in."""


def membership_of(
    address: tuple[str, int], slot: int, control: Control, *, backend: str
) -> Membership:
    """The membership of this process in the worlds that meet at `address`.

    Args:
        control: Has a stop reason when it is too late to join.
    """
    from torch.distributed import TCPStore

    from elastic_kfac.training.membership import Membership

    timeout = timedelta(seconds=MEMBER_TIMEOUT_S)
    store = TCPStore(*address, None, is_master=False, timeout=timeout)

    def give_up() -> None:
        if control.stop_reason() is not None:
            raise NeverAMember

    return Membership(
        store,
        slot,
        backend=backend,
        timeout_s=MEMBER_TIMEOUT_S,
        # A step or an evaluation may take minutes; the supervisor ends this process if nobody is left.
        join_s=float("inf"),
        while_joining=give_up,
    )


@contextlib.contextmanager
def process_group(
    coordinator: Any, rank: int, world_size: int, attempt: int, *, backend: str, timeout_s: float
) -> Iterator[Communicator]:
    """The process group of a group, owned here, so that a later one can be made in the same process.

    A rank that exits with an exception does not take part in an orderly end: its process ends soon,
    and that wakes the others.
    """
    from torch.distributed import TCPStore

    from elastic_kfac.communication.collectives import Communicator
    from elastic_kfac.training.membership import leave, regroup

    if world_size == 1:
        yield Communicator.solo()
        return
    timeout = timedelta(seconds=timeout_s)
    if rank == 0:
        host = ray.util.get_node_ip_address()
        store, port = listening_store(host, world_size, timeout)
        ray.get(coordinator.publish_store.remote(host, port))
    else:
        host, port = ray.get(coordinator.store_address.remote(attempt))
        store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    yield regroup(attempt, rank, world_size, store, backend=backend, timeout_s=timeout_s)
    leave()


def listening_store(host: str, world_size: int | None, timeout: timedelta) -> tuple[Any, int]:
    """A store that listens on one address only; returns it and its port."""
    from torch.distributed import TCPStore

    # Bound here, so that the port is free for certain and only this address listens.
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port
