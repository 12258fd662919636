"""Connects this process to a cluster, or says in one line why it cannot."""

from __future__ import annotations

import logging
import socket

import ray

from elastic_kfac.cluster.signals import kept_signal_handlers
from elastic_kfac.errors import UsageError


def connect(address: str, *, instead: str = "start a local cluster") -> None:
    """Connects as a driver whose terminal stays free of other processes' output.

    Args:
        address: What Ray takes: `auto`, `host:port` or `ray://…`.
        instead: What happens without an address, for the error message.

    Raises:
        UsageError: If there is no cluster at `address`.
    """
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "://" not in host:
            # Where nobody listens, Ray would end this process instead of raising.
            socket.create_connection((host, int(port)), timeout=10).close()
        with kept_signal_handlers():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.WARNING,
                namespace="elastic_kfac",
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"cannot connect to a Ray cluster: {str(error).splitlines()[0]}",
            given=f"--address {address}",
            allowed="auto (on a machine of the cluster) or the host:port of its head",
            change=f"leave --address away to {instead}",
        ) from None
