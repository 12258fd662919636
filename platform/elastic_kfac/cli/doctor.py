"""`elastic-kfac doctor`: what this machine lacks for a run, and what to do about it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from elastic_kfac.cli.provenance import announce
from elastic_kfac.errors import ElasticKfacError

if TYPE_CHECKING:
    from elastic_kfac.cluster.ray.nodes import ClusterFacts

GIB = 1 << 30
MIN_PYTHON = (3, 11)
MIN_SHARED_MEMORY = GIB // 2
MIN_FREE_DISK = 2 * GIB
RAY_SERIES = "2.60"
MAX_SKEW_S = 2.0
OLDEST_TIME = 1_735_689_600.0
"""2025-01-01: no machine of today can be earlier."""
LOOPBACK = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
"""Addresses that the local cluster gives to its first nodes."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    detail: str
    action: str | None = None
    """What to do; every `warn` and `fail` has one."""

    def lines(self) -> str:
        """The finding as people read it."""
        text = f"{self.level:<5} {self.subject:<14} {self.detail}"
        return text if self.action is None else f"{text}\n{'':<20} -> {self.action}"


def doctor(arguments: argparse.Namespace) -> int:
    """Prints every finding; returns 1 when one of them stops a run."""
    announce()
    failed = 0
    for finding in examine(arguments.storage, arguments.address):
        print(finding.lines(), flush=True)
        failed += finding.level == "fail"
    print(f"{failed} problem(s) to solve before a run" if failed else "ready to run")
    return 1 if failed else 0


def examine(storage: str, address: str | None = None) -> Iterator[Finding]:
    """Looks at everything in turn, cheapest first."""
    yield python_finding(sys.version_info[:3])
    yield from packages_findings()
    yield torch_finding()
    yield gpu_finding()
    yield ray_finding()
    yield zoo_finding()
    yield storage_finding(storage)
    yield shared_memory_finding(_free_bytes(Path("/dev/shm")))
    yield temporary_finding(Path(tempfile.gettempdir()))
    yield ports_finding(LOOPBACK)
    yield clock_finding(storage)
    yield from cluster_findings(address or os.environ.get("RAY_ADDRESS"))


def python_finding(version: tuple[int, int, int]) -> Finding:
    """Whether the interpreter is new enough."""
    text = ".".join(map(str, version))
    if version[:2] < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        action = f"install Python {wanted} or newer and make a new virtual environment with it"
        return Finding("fail", "Python", text, action)
    return Finding("ok", "Python", f"{text} at {sys.executable}")


def packages_findings() -> Iterator[Finding]:
    """Installed versions against what the package asks for."""
    try:
        wanted = importlib.metadata.requires("elastic-kfac") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "warn",
            "packages",
            "elastic-kfac itself is not installed (found through PYTHONPATH)",
            "pip install -c constraints.txt -e . if anything below is missing",
        )
        return
    from packaging.requirements import Requirement

    problems = []
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if problems:
        action = "pip install -c constraints.txt -e ."
        yield Finding("fail", "packages", "; ".join(problems), action)
    else:
        yield Finding("ok", "packages", "every dependency is there in an allowed version")


def torch_finding() -> Finding:
    """Imports torch and torchvision; a wrong pair is the most common broken installation."""
    error = None
    try:
        import torch  # noqa: F401
        import torchvision  # noqa: F401
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return judge_torch_pair(
        _version("torch"), _version("torchvision"), _torch_that_torchvision_wants(), error
    )


def judge_torch_pair(
    torch: str | None, torchvision: str | None, wanted_torch: str | None, error: str | None
) -> Finding:
    """Says what is wrong with an installed pair.

    Args:
        torch: Installed version, with its local part (`2.15.0+cpu`).
        torchvision: Installed version.
        wanted_torch: The torch version that this torchvision was built for.
        error: What importing the two raised.
    """
    pair = f"torch {torch or 'missing'}, torchvision {torchvision or 'missing'}"
    reinstall = "pip install --force-reinstall -c constraints.txt torch torchvision"
    if torch is None or torchvision is None:
        return Finding("fail", "torch", pair, "pip install -c constraints.txt torch torchvision")
    builds = [version.partition("+")[2] for version in (torch, torchvision)]
    if wanted_torch is not None and torch.partition("+")[0] != wanted_torch:
        detail = f"{pair}: this torchvision is built for torch {wanted_torch}"
        return Finding("fail", "torch", detail, f"install the pinned pair: {reinstall}")
    if ("cpu" in builds and builds[0] != builds[1]) or (
        error is not None and "torchvision::nms does not exist" in error
    ):
        detail = f"{pair}: one is a CPU-only build and the other is not"
        action = (
            f"take both from one index: {reinstall}, or with --index-url of the CPU-only builds"
        )
        return Finding("fail", "torch", detail, action)
    if error is not None:
        return Finding("fail", "torch", f"{pair}: {error}", reinstall)
    return Finding("ok", "torch", pair)


def gpu_finding() -> Finding:
    """Which accelerators torch can use."""
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = [torch.cuda.get_device_name(index) for index in range(count)]
    except Exception as error:
        return Finding("warn", "GPU", f"cannot ask torch: {error}", "solve the torch problem first")
    if names:
        return Finding("ok", "GPU", f"{len(names)}: {', '.join(sorted(set(names)))}")
    if Path("/dev/nvidia0").exists():
        return Finding(
            "warn",
            "GPU",
            "the machine has one, but torch cannot use it",
            "install a CUDA build of torch and a driver that is new enough for it (nvidia-smi)",
        )
    return Finding("ok", "GPU", "none; runs use the CPU (resources.use_gpu=false)")


def ray_finding() -> Finding:
    """Whether Ray imports, with the parts that training needs."""
    try:
        import ray.train.torch
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return Finding("fail", "Ray", detail, "pip install -c constraints.txt -e .")
    from elastic_kfac.cluster.ray.internals import changed_internals

    found = judge_ray_version(ray.__version__)
    if found.level == "ok" and (changed := changed_internals()):
        action = "install the release of constraints.txt: pip install -c constraints.txt -e ."
        return Finding("fail", "Ray", f"{ray.__version__} has changed {changed[0]}", action)
    return found


def judge_ray_version(version: str) -> Finding:
    """Other releases may change what the elastic part relies on."""
    if version.rpartition(".")[0] != RAY_SERIES:
        action = f"install Ray {RAY_SERIES}: pip install -c constraints.txt -e ."
        return Finding("fail", "Ray", f"{version} is not {RAY_SERIES}.x", action)
    return Finding("ok", "Ray", version)


def cluster_findings(address: str | None) -> Iterator[Finding]:
    """Whether the cluster that runs would use is there and fits."""
    if address is None:
        detail = "none given; runs start a local one (--address or RAY_ADDRESS names another)"
        yield Finding("ok", "cluster", detail)
        return
    try:
        from elastic_kfac.cluster.ray.nodes import examine_cluster

        facts = examine_cluster(address)
    except Exception as error:
        yield judge_connection_error(address, error)
        return
    yield judge_cluster(address, facts)
    yield judge_clocks("clocks", facts.clock_skews_s)


def judge_connection_error(address: str, error: Exception) -> Finding:
    """Says why a cluster cannot be used."""
    text = (
        error.line() if isinstance(error, ElasticKfacError) else f"{type(error).__name__}: {error}"
    )
    lines = text.strip().splitlines() or ["no reason given"]
    lowered = text.lower()
    if "version mismatch" in lowered:
        action = "use the versions of constraints.txt on this machine and on every node"
    elif "token" in lowered or "auth" in lowered:
        action = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token file"
    else:
        action = "check the address, that the head runs (`ray status`), and firewalls between"
    return Finding("fail", "cluster", f"{address}: {lines[0]}", action)


def judge_cluster(address: str, facts: ClusterFacts) -> Finding:
    """Whether a cluster has room for a worker and all of its nodes answer."""
    text = f"{address}: {facts.nodes} nodes, {facts.cpus:g} CPUs, {facts.gpus:g} GPUs"
    if facts.silent:
        action = "look at these nodes' raylet.out, or remove them from the cluster"
        return Finding("warn", "cluster", f"{text}; silent: {', '.join(facts.silent)}", action)
    if facts.cpus < 1:
        action = "add worker nodes; runs wait until there are elastic.min_workers"
        return Finding("warn", "cluster", f"{text}: no room for a worker", action)
    return Finding("ok", "cluster", text)


def clock_finding(storage: str) -> Finding:
    """This machine's clock against the one that stamps files of the run storage."""
    if "://" in storage:
        return judge_clocks("clock", {}, now=time.time())
    folder = Path(storage).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".elastic-kfac-") as probe:
            probe.write(b"x")
            probe.flush()
            stamped = Path(probe.name).stat().st_mtime
    except OSError:
        return judge_clocks("clock", {}, now=time.time())
    return judge_clocks("clock", {"the run storage": stamped - time.time()}, now=time.time())


def judge_clocks(
    subject: str, skews_s: Mapping[str, float], *, now: float | None = None
) -> Finding:
    """Says whose clock is wrong: deadlines of drains and times of events depend on it.

    Args:
        subject: Name of the finding.
        skews_s: By place, how far its clock is ahead of this machine's.
        now: This machine's time, to see whether it can be true.
    """
    action = "let all machines set their clocks by NTP (chrony, systemd-timesyncd)"
    if now is not None and now < OLDEST_TIME:
        detail = f"this machine thinks it is {time.strftime('%Y-%m-%d', time.gmtime(now))}"
        return Finding("fail", subject, detail, action)
    wrong = {place: skew for place, skew in skews_s.items() if abs(skew) > MAX_SKEW_S}
    if wrong:
        worst = "; ".join(f"{place} by {skew:+.1f} s" for place, skew in sorted(wrong.items()))
        return Finding("warn", subject, f"differ from this machine's: {worst}", action)
    compared = ", ".join(sorted(skews_s)) or "nothing to compare with"
    return Finding("ok", subject, f"agree to {MAX_SKEW_S:g} s ({compared})")


def zoo_finding() -> Finding:
    """Whether the model zoo imports, and what is in it."""
    try:
        from elastic_kfac.tasks.models import zoo

        names = sorted(zoo())
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return Finding("fail", "model zoo", detail, "solve the torch problem first")
    return Finding("ok", "model zoo", ", ".join(names))


def storage_finding(storage: str) -> Finding:
    """Whether runs can be written below `storage`, and how much room there is."""
    if "://" in storage and not storage.startswith("file://"):
        return _remote_storage_finding(storage)
    folder = Path(storage.removeprefix("file://")).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".elastic-kfac-") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return Finding(
            "fail",
            "storage",
            f"cannot write below {existing}: {error.strerror or error}",
            "name a folder that you may write to with --storage",
        )
    free = _free_bytes(existing) or 0
    if free < MIN_FREE_DISK:
        return Finding(
            "warn",
            "storage",
            f"{folder} has {free / GIB:.1f} GiB free",
            "delete old runs or name another folder with --storage",
        )
    return Finding("ok", "storage", f"{folder} is writable, {free / GIB:.0f} GiB free")


def shared_memory_finding(free: int | None) -> Finding:
    """Whether Ray's object store finds room in shared memory."""
    if free is None:
        return Finding(
            "warn", "shared memory", "no /dev/shm", "Ray will use files instead, which is slower"
        )
    text = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free < MIN_SHARED_MEMORY:
        action = "in a container: docker run --shm-size=2g, or a memory-backed volume on /dev/shm"
        return Finding("warn", "shared memory", text, action)
    return Finding("ok", "shared memory", text)


def temporary_finding(folder: Path) -> Finding:
    """Whether Ray can keep sockets and logs in the temporary folder."""
    free = _free_bytes(folder)
    if free is None or not os.access(folder, os.W_OK):
        action = "set TMPDIR to a short path that you may write to"
        return Finding("fail", "temporary", f"{folder} cannot be used", action)
    text = f"{folder} has {free / GIB:.1f} GiB free"
    if free < GIB:
        return Finding("warn", "temporary", text, "make room: Ray keeps its logs there")
    return Finding("ok", "temporary", text)


def ports_finding(addresses: tuple[str, ...]) -> Finding:
    """Whether a process may listen on the loopback addresses of the local cluster."""
    refused = []
    for address in addresses:
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as listener:
            try:
                listener.bind((address, 0))
                listener.listen(1)
                with contextlib.closing(socket.create_connection(listener.getsockname(), 2.0)):
                    pass
            except OSError as error:
                refused.append(f"{address} ({error.strerror or error})")
    if refused:
        return Finding(
            "fail",
            "ports",
            f"cannot listen on {', '.join(refused)}",
            "allow local TCP connections on 127.0.0.0/8 (firewall, sandbox or container settings)",
        )
    return Finding("ok", "ports", "local TCP connections work")


def _remote_storage_finding(storage: str) -> Finding:
    try:
        from pyarrow import fs

        filesystem, path = fs.FileSystem.from_uri(storage)
        name = f"{path.rstrip('/')}/.elastic-kfac-{os.getpid()}"
        with filesystem.open_output_stream(name) as stream:
            stream.write(b"x")
        filesystem.delete_file(name)
    except Exception as error:
        return Finding(
            "fail",
            "storage",
            f"cannot write to {storage}: {error}",
            "check the address, the credentials of this machine and its network",
        )
    return Finding("ok", "storage", f"{storage} is writable")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_that_torchvision_wants() -> str | None:
    try:
        wanted = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    exact = (text.replace(" ", "").partition("torch==")[2] for text in wanted)
    return next((version.partition(";")[0].partition("+")[0] for version in exact if version), None)


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
