"""A Ray cluster of several virtual nodes on this machine, bound to loopback.

A head without CPUs carries the driver, the run coordinator and Ray Train's controller; every further
node carries one worker, so that removing a node has the effect it has on a real cluster: all of the
node's processes end at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import ray

from elastic_kfac.cluster.ray.connection import environment, kept_signal_handlers
from elastic_kfac.cluster.ray.devices import local_gpu_ids
from elastic_kfac.cluster.ray.internals import Cluster, ray_services
from elastic_kfac.errors import RunError, UsageError

if TYPE_CHECKING:
    from elastic_kfac.config import Config

SOCKET_PATH_LIMIT = 107
"""Longest path of a unix socket on Linux."""

NODE_START_TIMEOUT_S = 150
"""Limit for the start of a node; a quiet machine needs a second, a very busy one a minute."""

SHARED_MEMORY = Path("/dev/shm")

ALIVE_FILE = "alive"
"""File of a cluster's folder that its driver keeps locked."""

_PREFIX = "ek-"

_SOCKET_NAME_LENGTH = len("/ray/session_2000-00-00_00-00-00_000000_0000000/sockets/plasma_store.10")

# A node whose processes were killed refuses connections, so that a few short periods suffice; the
# long timeout is for nodes that are alive on a busy machine.
_DETECTION = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 400,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}

# By default as many as CPUs, so that the actors of a run would start one after the other on the head.
_STARTING = {"worker_maximum_startup_concurrency": 8}

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "120",
}

# Imports of a rank: an idle process that has them can begin at once.
_PRELOADED = (
    "torch",
    "torch.distributed",
    "elastic_kfac.cluster.run.worker",
    "elastic_kfac.cluster.run.replicas",
    "elastic_kfac.training.loop",
    "elastic_kfac.runs.final_record",
)

_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_num_workers_soft_limit": "3",
}


class LocalCluster:
    """Virtual nodes of this machine; a context manager that ends every process it started.

    Nodes are numbered in the order of their start, from 0; a number is not used again.
    """

    def __init__(
        self,
        num_nodes: int,
        *,
        cpus_per_node: float = 1,
        gpus_per_node: float = 0,
        gpu_ids: Sequence[str] = (),
        resources_per_node: Mapping[str, float] | None = None,
        object_store_mib: int = 100,
        dashboard: bool = False,
        preload: Sequence[str] = (),
        start_attempts: int = 3,
    ) -> None:
        """Starts the head and `num_nodes` nodes besides it.

        Args:
            cpus_per_node: Logical CPUs of a node; more than the machine has is allowed.
            gpu_ids: CUDA names of devices of this machine, assigned to nodes in turn; without them all
                nodes see the same ones.
            object_store_mib: Shared memory of a node's object store, in MiB.
            dashboard: Whether to start Ray's dashboard (needed for the jobs API).
            preload: Further modules that idle worker processes import.
            start_attempts: Limit on attempts; on a busy machine the first may time out.

        Raises:
            UsageError: Outside the main thread, where Ray cannot start nodes.
            RunError: If no attempt succeeded, with the end of the node's log.
        """
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("a local cluster can only be started in the main thread")
        self._node_options: dict[str, Any] = {
            "num_cpus": cpus_per_node,
            "num_gpus": gpus_per_node,
            "resources": dict(resources_per_node or {}),
            "object_store_memory": object_store_mib << 20,
        }
        self._gpu_ids = tuple(gpu_ids)
        self._dashboard = dashboard
        self._preloaded = ",".join((*preload, *_PRELOADED))
        self._cluster: Cluster | None = None
        self._nodes: dict[int, Any] = {}
        self._gpu_turns: dict[int, int] = {}
        self._next_index = 0
        self._folder = Path()
        self._alive: IO[bytes] | None = None
        authentication_mode()
        for attempt in range(1, start_attempts + 1):
            try:
                self._start(num_nodes)
                return
            except BaseException as error:
                log = self._log_tail()
                self.shutdown()
                if not isinstance(error, Exception):
                    raise
                if attempt == start_attempts:
                    raise RunError(
                        f"the local Ray cluster did not start: {error}", change=log or None
                    ) from error

    @property
    def address(self) -> str:
        """Address for `ray.init`."""
        return str(self._require().address)

    @property
    def log_folder(self) -> Path:
        """Where Ray writes the logs of all nodes; deleted at shutdown."""
        return self._folder / "ray" / "session_latest" / "logs"

    @property
    def nodes(self) -> tuple[int, ...]:
        """Numbers of the nodes that were started and not removed."""
        return tuple(self._nodes)

    def node_id(self, index: int) -> str:
        """Ray's identifier of a node."""
        return str(self._nodes[index].node_id)

    def connect(self) -> None:
        """Connects this process as a driver; Ray's own messages stay in its log files."""
        with environment(self._variables()), kept_signal_handlers():
            ray.init(
                address=self.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace="elastic_kfac",
            )

    def add_node(self, *, wait: bool = True) -> int:
        """Starts one more node (main thread only) and returns its number."""
        cluster = self._require()
        index = self._next_index
        self._next_index += 1
        # Each node has its own loopback address; 127.0.0.1 would be rewritten to the host's.
        address = f"127.0.0.{3 + index % 250}"
        variables = {
            **self._variables(),
            **_WORKER_ENVIRONMENT,
            "RAY_preload_python_modules": self._preloaded,
            **self._devices(index),
        }
        with environment(variables), kept_signal_handlers(), _nodes_not_awaited():
            # Names of their own: Ray takes the first one without a file, and nodes start together.
            self._nodes[index] = cluster.add_node(
                wait=False,
                node_ip_address=address,
                raylet_socket_name=str(self._folder / f"raylet.{index + 1}"),
                plasma_store_socket_name=str(self._folder / f"plasma_store.{index + 1}"),
                **self._node_options,
            )
        if wait:
            self._await_node(self._nodes[index])
        return index

    def remove_node(self, index: int) -> None:
        """Ends all processes of a node at once (SIGKILL)."""
        node = self._nodes.pop(index)
        _kill(node)
        self._require().remove_node(node, allow_graceful=False)

    def kill_worker(self, pid: int) -> None:
        """SIGKILLs one worker process of this cluster; its node stays.

        Raises:
            UsageError: If the process does not belong to this cluster.
        """
        if not self._owns(pid):
            raise UsageError("not a worker process of this cluster", given=pid)
        os.kill(pid, signal.SIGKILL)

    def shutdown(self) -> None:
        """Disconnects, ends every process and deletes the cluster's files. Safe to call twice."""
        cluster, self._cluster = self._cluster, None
        folder, self._folder = self._folder, Path()
        alive, self._alive = self._alive, None
        self._nodes.clear()
        with environment({"RAY_TMPDIR": str(folder)}):
            if ray.is_initialized():
                with contextlib.suppress(Exception):
                    ray.shutdown()
            if cluster is not None:
                _end(cluster)
        if folder != Path():
            shutil.rmtree(folder, ignore_errors=True)
        if alive is not None:
            alive.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def _start(self, num_nodes: int) -> None:
        self._folder = _short_folder()
        self._alive = _hold(self._folder / ALIVE_FILE)
        (self._folder / "ray").mkdir()
        size = self._node_options["object_store_memory"]
        objects = object_folder((num_nodes + 1) * size, self._folder)
        self._node_options["plasma_directory"] = None if objects is None else str(objects)
        self._next_index = 0
        # By default as many as CPUs: the process that is started for a run's controller while prestarted
        # ones are on their way would end instead of serving the next actor.
        idle = {"RAY_num_workers_soft_limit": "2"}
        variables = {**self._variables(), **idle}
        with environment(variables), kept_signal_handlers(), _nodes_not_awaited():
            self._cluster = Cluster(initialize_head=False)
            head = self._cluster.add_node(
                wait=False,
                num_cpus=0,
                temp_dir=str(self._folder / "ray"),
                node_ip_address="127.0.0.2",
                dashboard_host="127.0.0.1",
                dashboard_port=0 if self._dashboard else None,
                # Any free port: the agent tries to get a taken one for four seconds.
                dashboard_agent_listen_port=0,
                include_dashboard=self._dashboard,
                include_log_monitor=False,
                no_monitor=True,
                object_store_memory=size,
                plasma_directory=self._node_options["plasma_directory"],
                _system_config={**_DETECTION, **_STARTING},
            )
        # A node asks the GCS for its head, and looks every second or two.
        self._await_node(head)
        for _ in range(num_nodes):
            self.add_node(wait=False)
        # Every run needs it, and takes half a second to import it.
        importlib.import_module("ray.train")
        for node in self._nodes.values():
            self._await_node(node)

    def _await_node(self, node: Any) -> None:
        deadline = time.monotonic() + NODE_START_TIMEOUT_S
        while True:
            try:
                self._require()._wait_for_node(node, timeout=1)
                return
            except TimeoutError:
                if not node.remaining_processes_alive():
                    raise RunError("a process of a starting node has ended") from None
                if time.monotonic() > deadline:
                    raise

    def _variables(self) -> dict[str, str]:
        return {
            **_ENVIRONMENT,
            "RAY_AUTH_MODE": authentication_mode(),
            "RAY_TMPDIR": str(self._folder),
        }

    def _devices(self, index: int) -> dict[str, str]:
        if not self._gpu_ids:
            return {}
        used = {self._gpu_turns.get(node) for node in self._nodes}
        turn = self._gpu_turns[index] = next(turn for turn in count() if turn not in used)
        size = math.ceil(self._node_options["num_gpus"])
        devices = [self._gpu_ids[(turn * size + i) % len(self._gpu_ids)] for i in range(size)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}

    def _require(self) -> Cluster:
        if self._cluster is None:
            raise RunError("the local cluster has been shut down")
        return self._cluster

    def _owns(self, pid: int) -> bool:
        # A worker's environment carries the private folder of the cluster that started it.
        try:
            content = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        return f"RAY_TMPDIR={self._folder}".encode() in content.split(b"\0")

    def _log_tail(self, lines: int = 5) -> str:
        for name in ("raylet.err", "raylet.out", "gcs_server.out"):
            with contextlib.suppress(OSError):
                text = (self.log_folder / name).read_text(errors="replace").strip()
                if text:
                    return f"{name}: " + " | ".join(text.splitlines()[-lines:])
        return ""


def start_line(num_nodes: int) -> str:
    """Reports that a local cluster starts, and that an address in the environment is not used."""
    line = f"Starting a local Ray cluster with {num_nodes} node{'s' * (num_nodes > 1)} …"
    if address := os.environ.get("RAY_ADDRESS"):
        line += f" (RAY_ADDRESS={address} is used with --address auto only)"
    return line


def cluster_for(config: Config, num_nodes: int, *, workers_per_node: int = 1) -> LocalCluster:
    """Starts a cluster whose nodes have the resources of `workers_per_node` workers each.

    Raises:
        UsageError: Also if this machine lacks the GPUs.
    """
    gpu_ids = local_gpu_ids(config, num_nodes * workers_per_node)
    resources = {
        name: amount * workers_per_node for name, amount in config.resources.of_a_worker().items()
    }
    return LocalCluster(
        num_nodes,
        cpus_per_node=resources.pop("CPU", float(workers_per_node)),
        gpus_per_node=resources.pop("GPU", 0.0),
        gpu_ids=gpu_ids,
        resources_per_node=resources,
        # Members of worlds that change in place do without it, Ray Train's own workers do not.
        preload=() if config.elastic.in_place else ("ray.train",),
    )


def _end(cluster: Cluster, patience_s: float = 10.0) -> None:
    # Abruptly: nothing on these nodes has to be saved, and a graceful stop takes seconds per node.
    for node in [*cluster.worker_nodes, cluster.head_node]:
        if node is None:
            continue
        _kill(node)
        with contextlib.suppress(Exception):
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    cluster.worker_nodes.clear()
    cluster.head_node = None
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            cluster.shutdown()
            return
        time.sleep(0.1)


def _kill(node: Any) -> None:
    """Ends all processes of a node, also those that its raylet started.

    Ray's agents would stay for a minute after their raylet, and try to report its end.
    """
    for pid in _descendants(entry[0].process.pid for entry in node.all_processes.values()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _nodes_not_awaited() -> Iterator[None]:
    """Nodes that are made inside return once their processes are started; `_await_node` does the rest.

    Ray would look once a second whether a node is there, and start no other one meanwhile. What it would
    read then, the node's ports, nobody asks for.
    """
    original = ray_services.get_node
    ray_services.get_node = lambda gcs_address, node_id: defaultdict(int)
    try:
        yield
    finally:
        ray_services.get_node = original


def _descendants(roots: Iterable[int]) -> list[int]:
    """The processes `roots` and all below them, parents first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # The name in brackets may contain blanks; the parent is the second field after it.
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = list(roots)
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def remove_abandoned_folders(parent: Path) -> list[Path]:
    """Deletes folders of clusters whose driver was killed before it could; returns them."""
    removed = []
    for alive in parent.glob(f"{_PREFIX}*/{ALIVE_FILE}"):
        with contextlib.suppress(OSError):
            # Only the lock of a driver that has ended is free.
            with _hold(alive):
                shutil.rmtree(alive.parent, ignore_errors=True)
            removed.append(alive.parent)
    return removed


def _hold(path: Path) -> IO[bytes]:
    stream = path.open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise
    return stream


def object_folder(num_bytes: int, folder: Path) -> Path | None:
    """Where object stores of `num_bytes` together lie: None is shared memory, if it has room; else in
    files below `folder`.

    Ray looks at one store at a time, needs /dev/shm to exist, and dies where it turns out to be full.
    """
    with contextlib.suppress(OSError):
        if shutil.disk_usage(SHARED_MEMORY).free >= num_bytes and os.access(SHARED_MEMORY, os.W_OK):
            return None
    objects = folder / "objects"
    objects.mkdir(exist_ok=True)
    # A remark about the folder at every start of a node.
    logging.getLogger("ray._private.services").setLevel(logging.WARNING)
    return objects


def _short_folder() -> Path:
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(parent) + len(f"/{_PREFIX}xxxxxxxx") + _SOCKET_NAME_LENGTH <= SOCKET_PATH_LIMIT:
            remove_abandoned_folders(Path(parent))
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    raise UsageError(
        "the path of the temporary folder is too long for Ray's sockets",
        given=tempfile.gettempdir(),
        change="set TMPDIR to a short path",
    )


def authentication_mode() -> str:
    """The authentication mode of an embedded cluster: `token` only where the user asks for it.

    It listens on loopback only.

    Raises:
        UsageError: If a token is required and there is none.
    """
    mode = os.environ.get("RAY_AUTH_MODE") or "disabled"
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if mode == "token" and not named and not Path("~/.ray/auth_token").expanduser().exists():
        raise UsageError(
            "there is no token for the local Ray cluster",
            given="RAY_AUTH_MODE=token",
            allowed="RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or the file ~/.ray/auth_token",
            change="make one with `ray get-auth-token --generate`, or set RAY_AUTH_MODE=disabled",
        )
    return mode
