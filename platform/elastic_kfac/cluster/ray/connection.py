"""This process as a driver of a Ray cluster: its connection, environment, output and signals."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray
from ray.exceptions import AuthenticationError

from elastic_kfac.cluster.ray.internals import (
    gcs_service_pb2,
    gcs_service_pb2_grpc,
    init_grpc_channel,
    ray_worker,
)
from elastic_kfac.errors import UsageError
from elastic_kfac.runs.signals import STOPPING

logger = logging.getLogger(__name__)

_REFUSALS = ("unauthenticated", "authentication token", "auth token")


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects for the duration of the block; an existing connection is used and kept."""
    if ray.is_initialized():
        yield
        return
    connect(address)
    try:
        yield
    finally:
        ray.shutdown()


def connect(address: str, *, instead: str = "start a local cluster") -> None:
    """Connects as a driver whose terminal stays free of other processes' output.

    Args:
        address: `auto`, `host:port` or `ray://…`.
        instead: What happens without an address, for the error message.

    Raises:
        UsageError: If there is no cluster at `address`, or it requires another token.
    """
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "://" not in host:
            # Where nothing listens, Ray would end this process instead of raising.
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
            change=f"drop --address to {instead}",
        ) from None


def wants_token(error: BaseException) -> bool:
    """Whether Ray reports a missing or wrong token."""
    text = str(error).lower()
    return isinstance(error, AuthenticationError) or any(part in text for part in _REFUSALS)


def _is_refused(address: str) -> bool:
    with init_grpc_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            head.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=10)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def no_token(given: str) -> UsageError:
    """The error of a process without the token of its cluster."""
    return UsageError(
        "the Ray cluster requires a token, and this process has none or a different one",
        given=given,
        allowed="RAY_AUTH_MODE=token with the cluster's token in RAY_AUTH_TOKEN, or in the file "
        "that RAY_AUTH_TOKEN_PATH names (else ~/.ray/auth_token)",
        change="run `ray get-auth-token` on the cluster's head to print it",
    )


@contextlib.contextmanager
def quiet_driver() -> Iterator[None]:
    """Sends what Ray would print about other processes to the log instead of the terminal."""
    original = ray_worker.print_to_stdstream

    def to_log(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        for line in data.get("lines", ()):
            logger.info("ray: %s", line)

    ray_worker.print_to_stdstream = to_log
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = original


@contextlib.contextmanager
def environment(variables: Mapping[str, str], *, user_wins: bool = False) -> Iterator[None]:
    """Sets variables for the block, for processes that Ray starts in it; then restores them.

    Args:
        user_wins: Whether a variable that is already set keeps its value.
    """
    if user_wins:
        variables = {n: value for n, value in variables.items() if n not in os.environ}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Keeps this process's handlers, which Ray replaces when a node starts or a driver connects.

    Processes that start in the block outlive a closed terminal: this one has them save their state.
    """
    is_main = threading.current_thread() is threading.main_thread()
    old = {number: signal.getsignal(number) for number in STOPPING if is_main}
    # Children inherit the mask. What comes meanwhile is delivered afterwards.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
