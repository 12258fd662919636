"""Measured costs of this kind of machine and of its links, for the planner.

Decompositions and products are kept per kind of host in the user's cache: a resize or another run on such
a host measures nothing. Another version of torch, another device or another number of threads is another
kind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.packing import Bucketer
from elastic_kfac.curvature import inverses
from elastic_kfac.host import processor_name
from elastic_kfac.json_text import parsed
from elastic_kfac.paths import user_cache
from elastic_kfac.placement.costs import EIGEN, CostModel, Method, fit_costs
from elastic_kfac.placement.devices import NETWORK
from elastic_kfac.placement.simulator import Calibration, Line, RankSpeed, all_reduce_rounds

DIMENSIONS = (16, 64, 128, 256, 512)
_CPU = torch.device("cpu")
_MESSAGES = (1 << 12, 1 << 22)
"""Bytes of the all-reduces that time a link."""
_CALLS, _COLD = 15, 1 << 22
"""Collectives that time a call, and bytes that are computed with between them."""


def measure_costs(
    method: Method,
    *,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.float32,
    dimensions: Sequence[int] = DIMENSIONS,
    repeats: int = 3,
) -> CostModel:
    """Times decompositions of random factors (least of `repeats`) and fits c0 + c1·d^p."""
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for size in dimensions:
        root = torch.randn(size, 2 * size, generator=generator, dtype=dtype).to(device)
        factor = root @ root.t() / size
        if method in EIGEN:
            seconds.append(least_seconds(lambda f=factor: inverses.eigen(f), device, repeats))  # type: ignore[misc]
        else:
            seconds.append(
                least_seconds(lambda f=factor: inverses.damped_inverse(f, 0.1), device, repeats)  # type: ignore[misc]
            )
    return fit_costs(dimensions, seconds)


def least_seconds(
    action: Callable[[], object],
    device: torch.device = _CPU,
    repeats: int = 3,
    *,
    waits: bool = False,
) -> float:
    """The shortest of `repeats` runs, after one to warm up.

    On a CPU it is the time that this thread computes, which other processes do not lengthen, unless the
    action `waits` for others.
    """
    clock = time.perf_counter if waits or device.type != "cpu" else time.thread_time
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        begin = clock()
        action()
        _wait(device)
        times.append(clock() - begin)
    return min(times[1:])


def host_kind(device: torch.device = _CPU, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """What measured costs hold for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "device": name,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "dtype": str(dtype),
        "torch": torch.__version__,
    }


def measured(
    method: Method, *, device: torch.device = _CPU, dtype: torch.dtype = torch.float32
) -> Calibration:
    """This host's costs on the stored network: from the user's cache, or measured (about a second)."""
    kind = {**host_kind(device, dtype), "method": method}
    name = hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()[:16]
    path = user_cache() / "calibration" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = parsed(path.read_text(encoding="utf-8"))
        if kept["kind"] == kind:
            return calibration_from(kept["calibration"])
    matrix = torch.randn(256, 256, dtype=dtype, device=device)
    tiny = torch.randn(8, 8, dtype=dtype, device=device)
    copied = torch.randn(1 << 18, dtype=dtype, device=device)
    buffer = torch.empty_like(copied)
    calibration = Calibration(
        costs=measure_costs(method, device=device, dtype=dtype),
        seconds_per_flop=least_seconds(lambda: matrix @ matrix, device, 10) / (2 * 256**3),
        network=NETWORK,
        # Four small products and a division in the eigen form, two products for inverses.
        seconds_per_layer=(5 if method in EIGEN else 2)
        * least_seconds(lambda: tiny @ tiny, device, 20),
        seconds_per_copied_byte=2
        * least_seconds(lambda: buffer.copy_(copied), device, 10)
        / copied.nbytes,
    )
    _keep(path, {"kind": kind, "calibration": asdict(calibration)})
    return calibration


def calibration_from(values: dict[str, Any]) -> Calibration:
    """The inverse of `dataclasses.asdict`."""
    inside = values["inside_node"]
    return Calibration(
        **{
            **values,
            "costs": CostModel(**values["costs"]),
            "network": Line(**values["network"]),
            "inside_node": None if inside is None else Line(**inside),
            "speeds": tuple(RankSpeed(*speed) for speed in values.get("speeds", ())),
        }
    )


def shared_calibration(
    communicator: Communicator,
    method: Method,
    *,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.float32,
    speeds: bool = False,
) -> Calibration:
    """Rank 0's costs and the links between all ranks, equal on every rank; with `speeds`, how fast the
    others are beside it. Collective.

    The lowest rank of each kind of host measures, so that equal hosts have equal speeds.
    """
    kinds: list[object] = [None] * communicator.world_size
    if speeds:
        kind = host_kind(device, dtype)
        kinds = communicator.all_gather_object(kind, tag="plan/calibration")
    measures = kinds.index(kinds[communicator.rank]) == communicator.rank
    own = measured(method, device=device, dtype=dtype) if measures else None
    known: list[Any] = communicator.all_gather_object(own, tag="plan/calibration")
    shared = with_links(known[0], communicator, device=device)
    if not speeds:
        return shared
    return replace(
        shared, speeds=tuple(_speed(known[0], known[kinds.index(kind)]) for kind in kinds)
    )


def _speed(one: Calibration, other: Calibration) -> RankSpeed:
    """Of another host beside one."""
    width = DIMENSIONS[-2]
    return RankSpeed(
        one.seconds_per_flop / other.seconds_per_flop,
        one.costs.seconds(width) / other.costs.seconds(width),
    )


def with_links(
    calibration: Calibration, communicator: Communicator, *, device: torch.device = _CPU
) -> Calibration:
    """`calibration` with latency and bandwidth as real all-reduces show them. Collective."""
    if communicator.world_size == 1:
        return calibration
    hosts: list[str] = communicator.all_gather_object(socket.gethostname(), tag="plan/hosts")
    counts = Counter(hosts)
    ranks_per_node = max(counts.values())
    if len(counts) == 1:
        rounds = all_reduce_rounds(communicator.world_size)
        network, call_s = _time_link(communicator, device, rounds)
        return replace(calibration, network=network, seconds_per_call=call_s)
    inside = None
    for host in sorted(counts):
        ranks = [rank for rank, other in enumerate(hosts) if other == host]
        group = communicator.subgroup(ranks)  # collective over all ranks
        if group is not None and group.world_size > 1:
            inside, _ = _time_link(group, device, 2 * (group.world_size - 1))  # a ring
    found: list[Line | None] = communicator.all_gather_object(inside, tag="plan/links")
    lines = [line for line in found if line is not None]
    slowest = max(lines, key=lambda line: line.at(1 << 20), default=None)
    leaders = [hosts.index(host) for host in sorted(counts)]
    between = communicator.subgroup(sorted(leaders))
    rounds = all_reduce_rounds(len(counts))
    own = None if between is None else _time_link(between, device, rounds)
    network, call_s = communicator.broadcast_object(own, min(leaders), tag="plan/links")
    calibration = replace(calibration, seconds_per_call=call_s)
    return replace(calibration, network=network, inside_node=slowest, ranks_per_node=ranks_per_node)


def _time_link(group: Communicator, device: torch.device, rounds: int) -> tuple[Line, float]:
    """α and β for which an all-reduce of so many rounds takes the time that the slowest rank saw, and the
    host's own time per call."""
    seconds = []
    # Of the usual rank: the slowest one's is mostly what else its processor did.
    call_s = median(group.all_gather_object(_call_seconds(group, device), tag="plan/links"))
    for size in _MESSAGES:
        tensor = torch.ones(size // 4, device=device)
        own = least_seconds(
            lambda t=tensor: group.all_reduce(t, tag="plan/links").wait(),  # type: ignore[misc]
            device,
            5,
            waits=True,
        )
        seconds.append(max(group.all_gather_object(own, tag="plan/links")))
    n = group.world_size
    small, large = (2 * (n - 1) / n * size for size in _MESSAGES)
    slope = max(0.0, (seconds[1] - seconds[0]) / (large - small))
    return Line(max(0.0, seconds[0] - slope * small) / rounds, slope), call_s


def _call_seconds(group: Communicator, device: torch.device) -> float:
    """The host's time to send two small tensors in a bucket, as a step does; the median of several with
    computation in between, after which caches are cold."""
    tensors = [torch.ones(4, device=device), torch.ones(4, device=device)]
    work = torch.ones(_COLD // 4)

    def call() -> None:
        bucketer = Bucketer(group, tag="plan/links")
        for tensor in tensors:
            bucketer.all_reduce(tensor)
        bucketer.flush().wait()

    times = []
    for _ in range(_CALLS + 1):
        work.add_(1.0)
        begin = time.thread_time()
        call()
        times.append(time.thread_time() - begin)
    return median(times[1:])


def _keep(path: Path, values: dict[str, Any]) -> None:
    """Writes a file whole, or not at all; a cache that cannot be written is no reason to fail."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        part.write_text(json.dumps(values, indent=1), encoding="utf-8")
        part.replace(path)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
