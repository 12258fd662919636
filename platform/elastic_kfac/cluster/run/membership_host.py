"""Where the members of a world that changes in place meet: a store that none of them hosts."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class MembershipHost:
    """The actor: one store per worker group; the one of the group before is closed."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._attempt = 0
        self._store: Any = None
        self._address = ("", 0)

    def open(self, attempt: int, founders: int) -> tuple[str, int]:
        """The address of a group's store; its first plan has the slots 0 … `founders` - 1.

        Raises:
            RuntimeError: If that group has been replaced.
        """
        from elastic_kfac.training.membership import StoreMembership

        if attempt < self._attempt:
            raise RuntimeError("this group has been replaced")
        if attempt > self._attempt:
            self._store = None
            host = ray.util.get_node_ip_address()
            self._store, port = listening_store(host, None, self._timeout)
            StoreMembership.found(self._store, range(founders))
            self._attempt, self._address = attempt, (host, port)
        return self._address


def create_membership_host(node_id: str) -> Any:
    """Starts the actor on a node that outlives the workers; returns its handle at once."""
    return (
        ray.remote(MembershipHost)
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote()
    )


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
