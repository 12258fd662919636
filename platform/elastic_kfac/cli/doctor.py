"""`elastic-kfac doctor`: what prevents a run on this machine, and how to fix it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from elastic_kfac.cli.provenance import announce
from elastic_kfac.errors import ElasticKfacError
from elastic_kfac.paths import local_folder

if TYPE_CHECKING:
    from elastic_kfac.cluster.ray.nodes import ClusterFacts

GIB = 1 << 30
MIN_PYTHON = (3, 11)
MIN_SHARED_MEMORY = GIB // 2
MIN_FREE_DISK = 2 * GIB
RAY_SERIES = "2.60"
MAX_SKEW_S = 2.0
OLDEST_TIME = 1_735_689_600.0
"""2025-01-01: an earlier clock must be wrong."""
LOOPBACK = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
"""Addresses of the first nodes of a local cluster."""
_IN_WHEEL = Path(__file__).parents[1] / "shipped" / "constraints.txt"
CONSTRAINTS = str(_IN_WHEEL) if _IN_WHEEL.is_file() else "constraints.txt"
INSTALL = f"pip install -c {CONSTRAINTS} " + (
    "'elastic-kfac[tune]'" if _IN_WHEEL.is_file() else "-e '.[tune,vision]'"
)
REINSTALL_TORCH = f"pip install --force-reinstall -c {CONSTRAINTS} torch torchvision"
NEEDED_EXTRAS = ("", "train")
"""What a run needs; the others are for some commands and models."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    detail: str
    action: str | None = None
    """How to fix it; every `warn` and `fail` has one."""

    def lines(self) -> str:
        """One line, and a second with the action."""
        text = f"{self.level:<5} {self.subject:<14} {self.detail}"
        return text if self.action is None else f"{text}\n{'':<20} -> {self.action}"


def doctor(arguments: argparse.Namespace) -> int:
    """Prints every finding; returns 1 if one of them prevents a run."""
    if arguments.json:
        found = list(examine(arguments.storage, arguments.address))
        ready = all(finding.level != "fail" for finding in found)
        print(json.dumps({"ready": ready, "findings": [asdict(each) for each in found]}, indent=2))
        return 0 if ready else 1
    announce()
    failed = 0
    for finding in examine(arguments.storage, arguments.address):
        print(finding.lines(), flush=True)
        failed += finding.level == "fail"
    problems = "1 problem" if failed == 1 else f"{failed} problems"
    print(f"{problems} to fix before a run" if failed else "ready to run")
    return 1 if failed else 0


def examine(storage: str, address: str | None = None) -> Iterator[Finding]:
    """Runs every check, the cheapest first."""
    yield python_finding(sys.version_info[:3])
    yield packages_finding()
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
    """Version of the interpreter."""
    text = ".".join(map(str, version))
    if version[:2] >= MIN_PYTHON:
        return Finding("ok", "Python", f"{text} at {sys.executable}")
    wanted = ".".join(map(str, MIN_PYTHON))
    action = f"install Python {wanted} or newer and create a new virtual environment with it"
    return Finding("fail", "Python", text, action)


def packages_finding() -> Finding:
    """Installed versions against the package's constraints, and the extras that are not there."""
    from packaging.requirements import Requirement

    from elastic_kfac.cli.extras import marked_extra

    try:
        wanted = importlib.metadata.requires("elastic-kfac") or []
    except importlib.metadata.PackageNotFoundError:
        detail = "elastic-kfac itself is not installed (found through PYTHONPATH)"
        return Finding("warn", "packages", detail, f"{INSTALL} if a check below fails")
    problems = []
    left_out: set[str] = set()
    for text in wanted:
        requirement, extra = Requirement(text), marked_extra(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = _version(requirement.name)
        if version is None and extra not in NEEDED_EXTRAS:
            left_out.add(extra)
        elif version is None:
            problems.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if problems:
        return Finding("fail", "packages", "; ".join(problems), INSTALL)
    without = f"; without [{', '.join(sorted(left_out - {'dev'}))}]" if left_out - {"dev"} else ""
    return Finding("ok", "packages", f"all dependencies satisfy their constraints{without}")


def torch_finding() -> Finding:
    """Imports torch and torchvision; a mismatched pair is the most common broken installation."""
    error = None
    try:
        import torch  # noqa: F401

        if _version("torchvision") is not None:
            import torchvision  # noqa: F401
    except Exception as caught:
        error = _text(caught)
    wanted = _torch_required_by_torchvision()
    return judge_torch_pair(_version("torch"), _version("torchvision"), wanted, error)


def judge_torch_pair(
    torch: str | None, torchvision: str | None, wanted_torch: str | None, error: str | None
) -> Finding:
    """Judges an installed pair.

    Args:
        torch: Installed version, with its local part (`2.15.0+cpu`).
        torchvision: Installed version.
        wanted_torch: The torch version that this torchvision was built for.
        error: What importing the two raised.
    """
    pair = f"torch {torch or 'missing'}, torchvision {torchvision or 'missing'}"
    if torch is None:
        return Finding("fail", "torch", pair, INSTALL)
    if torchvision is None:
        pair = f"torch {torch}, without torchvision ([vision])"
        if error is not None:
            return Finding("fail", "torch", f"{pair}: {error}", REINSTALL_TORCH)
        return Finding("ok", "torch", pair)
    builds = [version.partition("+")[2] for version in (torch, torchvision)]
    if wanted_torch is not None and torch.partition("+")[0] != wanted_torch:
        detail = f"{pair}: this torchvision is built for torch {wanted_torch}"
        return Finding("fail", "torch", detail, f"install the pinned pair: {REINSTALL_TORCH}")
    is_half_cpu = "cpu" in builds and builds[0] != builds[1]
    if is_half_cpu or (error is not None and "torchvision::nms does not exist" in error):
        detail = f"{pair}: one is a CPU-only build and the other is not"
        action = (
            f"take both from one index: {REINSTALL_TORCH}, with --index-url for CPU-only builds"
        )
        return Finding("fail", "torch", detail, action)
    if error is not None:
        return Finding("fail", "torch", f"{pair}: {error}", REINSTALL_TORCH)
    return Finding("ok", "torch", pair)


def gpu_finding() -> Finding:
    """Accelerators that torch can use."""
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        names = [torch.cuda.get_device_name(index) for index in range(count)]
    except Exception as error:
        return Finding("warn", "GPU", f"torch cannot be queried: {error}", "fix torch first")
    if names:
        return Finding("ok", "GPU", f"{len(names)}: {', '.join(sorted(set(names)))}")
    if Path("/dev/nvidia0").exists():
        action = "install a CUDA build of torch, and a driver that is new enough (nvidia-smi)"
        return Finding("warn", "GPU", "present, but torch cannot use it", action)
    return Finding("ok", "GPU", "none; runs use the CPU (resources.use_gpu=false)")


def ray_finding() -> Finding:
    """Version of Ray, and the private parts of it that elastic runs use."""
    try:
        import ray.train.torch
    except Exception as error:
        return Finding("fail", "Ray", _text(error), INSTALL)
    from elastic_kfac.cluster.ray.internals import changed_internals

    found = judge_ray_version(ray.__version__)
    if found.level == "ok" and (changed := changed_internals()):
        action = f"install the release of constraints.txt: {INSTALL}"
        return Finding("fail", "Ray", f"{ray.__version__} has changed {changed[0]}", action)
    return found


def judge_ray_version(version: str) -> Finding:
    """Other releases may have changed what elastic runs rely on."""
    if version.rpartition(".")[0] == RAY_SERIES:
        return Finding("ok", "Ray", version)
    detail = f"{version} is not {RAY_SERIES}.x"
    return Finding("fail", "Ray", detail, f"install Ray {RAY_SERIES}: {INSTALL}")


def zoo_finding() -> Finding:
    """The built-in models."""
    try:
        from elastic_kfac.zoo import MODELS

        return Finding("ok", "models", ", ".join(sorted(MODELS)))
    except Exception as error:
        return Finding("fail", "models", _text(error), "fix torch first")


def storage_finding(storage: str) -> Finding:
    """Write access to `storage`, and its free space."""
    try:
        given = local_folder(storage)
    except ElasticKfacError as error:
        return Finding("fail", "storage", error.line(), "correct --storage")
    if given is None:
        return _remote_storage_finding(storage)
    folder, existing = _existing(given)
    try:
        _probe(existing)
    except OSError as error:
        detail = f"cannot write below {existing}: {error.strerror or error}"
        return Finding("fail", "storage", detail, "name a writable folder with --storage")
    free = _free_bytes(existing) or 0
    if free < MIN_FREE_DISK:
        action = "delete old runs or name another folder with --storage"
        return Finding("warn", "storage", f"{folder} has {free / GIB:.1f} GiB free", action)
    return Finding("ok", "storage", f"{folder} is writable, {free / GIB:.0f} GiB free")


def _remote_storage_finding(storage: str) -> Finding:
    try:
        from pyarrow import fs

        filesystem, path = fs.FileSystem.from_uri(storage)
        name = f"{path.rstrip('/')}/.elastic-kfac-{os.getpid()}"
        with filesystem.open_output_stream(name) as stream:
            stream.write(b"x")
        filesystem.delete_file(name)
    except Exception as error:
        action = "check the address, this machine's credentials and its network"
        return Finding("fail", "storage", f"cannot write to {storage}: {error}", action)
    return Finding("ok", "storage", f"{storage} is writable")


def shared_memory_finding(free: int | None) -> Finding:
    """Room for Ray's object store in shared memory."""
    if free is None:
        action = "mount one, or Ray falls back to files, which is slower"
        return Finding("warn", "shared memory", "no /dev/shm", action)
    text = f"{free / GIB:.1f} GiB free in /dev/shm"
    if free < MIN_SHARED_MEMORY:
        action = "in a container: docker run --shm-size=2g, or a memory-backed volume on /dev/shm"
        return Finding("warn", "shared memory", text, action)
    return Finding("ok", "shared memory", text)


def temporary_finding(folder: Path) -> Finding:
    """Room for Ray's sockets and logs in the temporary folder."""
    free = _free_bytes(folder)
    if free is None or not os.access(folder, os.W_OK):
        action = "set TMPDIR to a short path that you may write to"
        return Finding("fail", "temporary", f"{folder} is not writable", action)
    text = f"{folder} has {free / GIB:.1f} GiB free"
    if free < GIB:
        return Finding("warn", "temporary", text, "free some space: Ray writes its logs there")
    return Finding("ok", "temporary", text)


def ports_finding(addresses: tuple[str, ...]) -> Finding:
    """Permission to listen on the loopback addresses of a local cluster."""
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
        action = "allow TCP connections on 127.0.0.0/8 (firewall, sandbox or container settings)"
        return Finding("fail", "ports", f"cannot listen on {', '.join(refused)}", action)
    return Finding("ok", "ports", "local TCP connections work")


def clock_finding(storage: str) -> Finding:
    """This machine's clock against the one that stamps files in the run storage."""
    skews = {}
    with contextlib.suppress(OSError, ElasticKfacError):
        if (folder := local_folder(storage)) is not None:
            skews["the run storage"] = _probe(_existing(folder)[1]) - time.time()
    return judge_clocks("clock", skews, now=time.time())


def judge_clocks(
    subject: str, skews_s: Mapping[str, float], *, now: float | None = None
) -> Finding:
    """Judges clocks: deadlines of drains and times of events depend on them.

    Args:
        subject: Name of the finding.
        skews_s: Seconds by which each place's clock is ahead of this machine's.
        now: This machine's time, to check whether it can be right.
    """
    action = "synchronise the clocks of all machines by NTP (chrony, systemd-timesyncd)"
    if now is not None and now < OLDEST_TIME:
        detail = f"this machine's date is {time.strftime('%Y-%m-%d', time.gmtime(now))}"
        return Finding("fail", subject, detail, action)
    wrong = {place: skew for place, skew in skews_s.items() if abs(skew) > MAX_SKEW_S}
    if wrong:
        worst = "; ".join(f"{place} by {skew:+.1f} s" for place, skew in sorted(wrong.items()))
        return Finding("warn", subject, f"differs from this machine's: {worst}", action)
    compared = ", ".join(sorted(skews_s)) or "nothing to compare with"
    return Finding("ok", subject, f"agrees within {MAX_SKEW_S:g} s ({compared})")


def cluster_findings(address: str | None) -> Iterator[Finding]:
    """The cluster that runs would use."""
    if address is None:
        detail = "none given; runs start a local one (--address names another)"
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
    """Explains why a cluster cannot be used."""
    text = error.line() if isinstance(error, ElasticKfacError) else _text(error)
    lines, lowered = text.strip().splitlines() or ["no reason given"], text.lower()
    if "version mismatch" in lowered:
        action = "use the versions of constraints.txt on this machine and on every node"
    elif "token" in lowered or "auth" in lowered:
        action = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token file"
    else:
        action = "check the address, the head (`ray status`) and firewalls in between"
    return Finding("fail", "cluster", f"{address}: {lines[0]}", action)


def judge_cluster(address: str, facts: ClusterFacts) -> Finding:
    """Room for a worker, and nodes that do not answer."""
    text = f"{address}: {facts.nodes} nodes, {facts.cpus:g} CPUs, {facts.gpus:g} GPUs"
    if facts.silent:
        action = "check raylet.out of these nodes, or remove them from the cluster"
        return Finding("warn", "cluster", f"{text}; silent: {', '.join(facts.silent)}", action)
    if facts.cpus < 1:
        action = "add nodes; runs wait for elastic.min_workers"
        return Finding("warn", "cluster", f"{text}: no room for a worker", action)
    return Finding("ok", "cluster", text)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _existing(folder: Path) -> tuple[Path, Path]:
    """A folder, and the nearest one at or above it that exists."""
    folder = folder.absolute()
    return folder, next(path for path in (folder, *folder.parents) if path.exists())


def _probe(folder: Path) -> float:
    """Writes and removes a file; returns the time that the file system stamped on it."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".elastic-kfac-") as probe:
        probe.write(b"x" * 4096)
        probe.flush()
        os.fsync(probe.fileno())
        return Path(probe.name).stat().st_mtime


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_required_by_torchvision() -> str | None:
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
