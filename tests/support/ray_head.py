"""A head as `ray start` makes it, with its dashboard and metrics, for tests of the real thing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class RayHead:
    """A running head and how to reach it; everything listens on loopback."""

    address: str
    dashboard: str
    metrics: str
    temp_dir: Path
    environment: Mapping[str, str]

    def ray(self, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Runs Ray's command line against this head, in the repository."""
        return self.run([str(SCRIPTS / "ray"), *arguments], timeout_s=timeout_s)

    def run(
        self, command: Sequence[str], *, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the repository, with this head's environment."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def submit(
        self, script: str, *arguments: str, options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit` as the README says it, with the committed runtime environment.

        Asks again while the agent of a node that has just started is not up, as Ray's answer says.
        """
        deadline = time.monotonic() + 90
        while True:
            job = self.ray(
                "job",
                "submit",
                *("--working-dir", "."),
                *("--runtime-env", "jobs/runtime_env.yaml"),
                *options,
                "--",
                "python",
                script,
                *arguments,
            )
            if "No available agent to submit job" not in job.stderr or time.monotonic() > deadline:
                return job
            time.sleep(2)

    def scrape(self) -> str:
        """What Prometheus would read now."""
        with urllib.request.urlopen(self.metrics, timeout=10) as reply:
            return str(reply.read().decode())

    def log_of_actor(self, shown_as: str) -> list[dict[str, Any]]:
        """The structured lines that Ray's dashboard shows with an actor."""
        listed = json.loads(self._dashboard_reads("/api/v0/actors?detail=true"))
        actors = listed["data"]["result"]["result"]
        (actor,) = (entry for entry in actors if entry["repr_name"] == shown_as)
        where = f"actor_id={actor['actor_id']}&suffix=err&lines=-1"
        text = self._dashboard_reads(f"/api/v0/logs/file?{where}")
        return [json.loads(line) for line in re.findall(r'\{"time".*\}', text)]

    def _dashboard_reads(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.dashboard}{path}", timeout=60) as reply:
            return str(reply.read().decode())


@contextmanager
def ray_head(
    *,
    num_cpus: int = 2,
    variables: Mapping[str, str] | None = None,
    autoscaled_nodes: int = 0,
    attempts: int = 3,
) -> Iterator[RayHead]:
    """Starts a head with its own temporary folder and free ports; ends all of its processes.

    With `autoscaled_nodes` Ray's autoscaler (v2) runs, too, and makes up to so many nodes of one CPU on
    this machine when they are asked for.

    Raises:
        RuntimeError: If it does not answer; with the end of what it said.
    """
    said = ""
    for _ in range(attempts):
        # Short: Ray keeps unix sockets below it.
        folder = Path(tempfile.mkdtemp(prefix="ek-head-", dir="/tmp"))
        process: subprocess.Popen[bytes] | None = None
        try:
            head, command = _head(folder, num_cpus, variables or {}, autoscaled_nodes)
            log = folder / "start.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    env=dict(head.environment),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            if _is_up(process, head):
                yield head
                return
            said = log.read_text(errors="replace")[-2000:]
        finally:
            if process is not None:
                _end(process)
            shutil.rmtree(folder, ignore_errors=True)
    raise RuntimeError(f"the head did not start: {said}")


@contextmanager
def joined_node(
    head: RayHead, *, num_cpus: int = 1, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """One more node, as in a pod: the process in front is `ray start --block`.

    Raises:
        RuntimeError: If it does not join; with the end of what it said.
    """
    command = [
        *(str(SCRIPTS / "ray"), "start", "--block", f"--address={head.address}"),
        "--node-ip-address=127.0.0.254",
        f"--num-cpus={num_cpus}",
        "--object-store-memory=150000000",
    ]
    log = head.temp_dir / f"node-{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**head.environment, **(variables or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until(lambda: process.poll() is not None or b"--block" in log.read_bytes(), 120)
        if process.poll() is not None or b"--block" not in log.read_bytes():
            raise RuntimeError(f"the node did not join: {log.read_text(errors='replace')[-2000:]}")
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Waits for an event; whether it came."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [int(listener.getsockname()[1]) for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def _head(
    folder: Path, num_cpus: int, variables: Mapping[str, str], autoscaled_nodes: int
) -> tuple[RayHead, list[str]]:
    gcs, dashboard, metrics, agent, agent_grpc = free_ports(5)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "120",
        "RAY_raylet_start_wait_time_s": "60",
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    environment.pop("PYTHONPATH", None)
    host, autoscaling = "127.0.0.1", []
    if autoscaled_nodes:
        # Ray would have 127.0.0.1 mean this machine's other address.
        host = "127.0.0.2"
        environment |= _AUTOSCALER_ENVIRONMENT
        path = folder / "autoscaling.json"
        path.write_text(json.dumps(_autoscaling(f"{host}:{gcs}", autoscaled_nodes)))
        autoscaling = [f"--autoscaling-config={path}"]
    command = [
        *(str(SCRIPTS / "ray"), "start", "--head", "--block"),
        f"--node-ip-address={host}",
        f"--port={gcs}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--metrics-export-port={metrics}",
        f"--num-cpus={num_cpus}",
        "--object-store-memory=150000000",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
        *autoscaling,
    ]
    head = RayHead(
        address=f"{host}:{gcs}",
        dashboard=f"http://127.0.0.1:{dashboard}",
        metrics=f"http://{host}:{metrics}/metrics",
        temp_dir=folder,
        environment={**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"},
    )
    return head, command


_HEAD_INSTANCE = "f" * 51 + "00000"
_AUTOSCALER_ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_INSTANCE,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_INSTANCE,
}

_COMMANDS = (
    *("cluster_synced_files", "initialization_commands", "setup_commands"),
    *("head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)
"""Of a configuration that has no defaults: nothing to copy, nothing to run."""


def _autoscaling(gcs_address: str, nodes: int) -> dict[str, Any]:
    """A cluster whose nodes are processes of the autoscaler's own, and so of the head's session."""
    resources = {"CPU": 1, "object_store_memory": 150_000_000}
    return {
        "cluster_name": "local",
        "max_workers": nodes,
        "provider": {
            # As `fake_multinode`, whose file of defaults Ray's wheel lacks.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs_address,
            "head_node_id": _HEAD_INSTANCE,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": resources, "node_config": {}, "max_workers": nodes},
        },
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1.0,
        **{name: {} for name in ("auth", "file_mounts")},
        **{name: [] for name in _COMMANDS},
    }


def _is_up(process: subprocess.Popen[bytes], head: RayHead) -> bool:
    """Waits until the head answers or has ended."""
    until(lambda: process.poll() is not None or _answers(head), 120)
    return process.poll() is None and _answers(head)


def _answers(head: RayHead) -> bool:
    for url in (f"{head.dashboard}/api/version", head.metrics):
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError as error:
            # A head that asks for a token answers, too.
            if getattr(error, "code", None) != 401:
                return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """`ray start --block` ends what it started; what is left is in its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
