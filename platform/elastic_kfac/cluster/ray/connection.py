"""Connects this process to a cluster, or says in one line why it cannot."""

from __future__ import annotations

import logging
import socket

import grpc  # type: ignore[import-untyped]
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from elastic_kfac.cluster.ray.signals import kept_signal_handlers
from elastic_kfac.errors import UsageError

_REFUSALS = ("unauthenticated", "authentication token", "auth token")


def connect(address: str, *, instead: str = "start a local cluster") -> None:
    """Connects as a driver whose terminal stays free of other processes' output.

    Args:
        address: What Ray takes: `auto`, `host:port` or `ray://…`.
        instead: What happens without an address, for the error message.

    Raises:
        UsageError: If there is no cluster at `address`, or it wants another token.
    """
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "://" not in host:
            # Where nobody listens, Ray would end this process instead of raising.
            socket.create_connection((host, int(port)), timeout=10).close()
            if _is_refused(address):
                raise no_token(f"--address {address}")
        with kept_signal_handlers():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.WARNING,
                namespace="elastic_kfac",
            )
    except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
        if wants_token(error):
            raise no_token(f"--address {address}") from None
        raise UsageError(
            f"cannot connect to a Ray cluster: {str(error).splitlines()[0]}",
            given=f"--address {address}",
            allowed="auto (on a machine of the cluster) or the host:port of its head",
            change=f"leave --address away to {instead}",
        ) from None


def wants_token(error: BaseException) -> bool:
    """Whether Ray says that the token is missing or not the cluster's."""
    text = str(error).lower()
    return isinstance(error, AuthenticationError) or any(part in text for part in _REFUSALS)


def _is_refused(address: str) -> bool:
    # Ray would try for 20 s, and then say that it cannot connect but not why.
    with init_grpc_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            head.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=10)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def no_token(given: str) -> UsageError:
    """The error of a process that has not the token of its cluster."""
    return UsageError(
        "the Ray cluster asks for a token, and this process has none or another one",
        given=given,
        allowed="RAY_AUTH_MODE=token with the cluster's token in RAY_AUTH_TOKEN, or in the file "
        "that RAY_AUTH_TOKEN_PATH names (else ~/.ray/auth_token)",
        change="`ray get-auth-token` on the cluster's head says it",
    )
