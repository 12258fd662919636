"""How the ranks of a group meet: one process group for its life, or worlds that change in place."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from elastic_kfac.communication.collectives import Communicator
    from elastic_kfac.training.callbacks import Control
    from elastic_kfac.training.membership import Membership

MEMBER_TIMEOUT_S = 60.0
"""For joining, and for collectives between members."""


class NeverAMember(Exception):
    """The run was drained or over before the members took this process in."""


class MembershipHost:
    """The actor that hosts the store of a group's worlds: none of the members does."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._attempt = 0
        self._store: Any = None
        self._address = ("", 0)

    def open(self, attempt: int, founders: int) -> tuple[str, int]:
        """The address of a group's store; its first world has the slots 0 … `founders` - 1.

        The store of the group before is closed.

        Raises:
            RuntimeError: If that group has been replaced.
        """
        from elastic_kfac.training.membership import Membership

        if attempt < self._attempt:
            raise RuntimeError("this group has been replaced")
        if attempt > self._attempt:
            self._store = None
            host = ray.util.get_node_ip_address()
            self._store, port = _listening_store(host, None, self._timeout)
            Membership.found(self._store, range(founders))
            self._attempt, self._address = attempt, (host, port)
        return self._address


def membership_of(
    host: Any, joined: Mapping[str, Any], control: Control, *, backend: str
) -> Membership:
    """The membership of this process in its group's worlds.

    Args:
        joined: The coordinator's answer when this process joined.
        control: Has a stop reason when it is too late to join.
    """
    from torch.distributed import TCPStore

    from elastic_kfac.training.membership import Membership

    address, port = ray.get(host.open.remote(joined["attempt"], joined["founders"]))
    store = TCPStore(
        address, port, None, is_master=False, timeout=timedelta(seconds=MEMBER_TIMEOUT_S)
    )

    def give_up() -> None:
        if control.stop_reason() is not None:
            raise NeverAMember

    return Membership(
        store,
        int(joined["slot"]),
        backend=backend,
        timeout_s=MEMBER_TIMEOUT_S,
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
        store, port = _listening_store(host, world_size, timeout)
        ray.get(coordinator.publish_store.remote(host, port))
    else:
        host, port = ray.get(coordinator.store_address.remote(attempt))
        store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    yield regroup(attempt, rank, world_size, store, backend=backend, timeout_s=timeout_s)
    leave()


def _listening_store(host: str, world_size: int | None, timeout: timedelta) -> tuple[Any, int]:
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
