"""What a step of a configured model costs: measured on this machine, or estimated for a named device.

Measured are the model's passes and K-FAC's own step, phase by phase, on one rank that holds everything;
what other ranks hold and do follows from shapes (`placement.simulator`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from elastic_kfac.communication.packing import CACHED_WIDTH, triangle_size
from elastic_kfac.config import Config
from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.stacks import Stacks
from elastic_kfac.kfac.calibration import host_kind, least_seconds, measure_costs
from elastic_kfac.kfac.kfac import KFAC
from elastic_kfac.kfac.options import value_at
from elastic_kfac.kfac.refresh import busy_steps
from elastic_kfac.placement.costs import (
    CostModel,
    LayerShape,
    factor_elements,
    second_order_elements,
    weight_elements,
)
from elastic_kfac.placement.devices import Device
from elastic_kfac.placement.simulator import Calibration, Line, Workload, fit_line
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.runs.profiled_steps import (
    FACTORS_EVERY,
    INVERSES_EVERY,
    SPREAD_OVER,
    PeakBytes,
    Steps,
)


@dataclass(frozen=True)
class Spreading:
    """What spreading statistics over steps changes."""

    step_s: float
    """Seconds that every further step with statistics takes."""
    memory: Mapping[str, Any]
    """As fields of a workload."""


@dataclass(frozen=True)
class Profile:
    """What the planner knows of a configuration on a device."""

    workload: Workload
    """With all layers due in the same steps."""
    calibration: Calibration
    basis: str
    """Where the figures come from, in words."""
    residual: float | None = None
    """Measured time of the model's decompositions over that of random matrices of usual widths, which
    the costs are corrected by; None if nothing was measured."""
    busy: Callable[[Config], tuple[int, int]] = lambda config: (1, 1)
    """Steps of an interval with statistics and with decompositions, by configuration."""
    spreading: Spreading | None = None
    """None where it was not measured."""

    def workload_of(self, config: Config) -> Workload:
        """The workload with the intervals that `config` begins with."""
        work = with_intervals(self.workload, config.kfac)
        statistics, decompositions = self.busy(config)
        work = replace(work, statistics_steps=statistics, decomposition_steps=decompositions)
        if self.spreading is None or statistics == decompositions == 1:
            return work
        return replace(work, statistics_step_s=self.spreading.step_s, **self.spreading.memory)


def measure(sized: Sized, calibration: Calibration) -> Profile:
    """Runs steps of the configuration on this machine; `calibration` gives the links.

    Seconds are those of usual steps (medians), in the CPU time of this thread.
    """
    begin = time.thread_time()
    sized.loss(2).backward()
    is_quick = time.thread_time() - begin < 1.0
    largest = max(3, min(128, sized.config.train.global_batch_size))
    batches = (max(1, largest // 8), max(2, largest // 2), largest) if is_quick else (1, 2, 3)

    def passes(after: Callable[[], object] = lambda: None) -> list[float]:
        """Seconds by batch: these take turns, as a machine's speed varies."""
        found: list[list[float]] = []
        start = time.thread_time()
        while len(found) < (4 if is_quick else 2) or (
            len(found) < 16 and time.thread_time() - start < 1.0
        ):
            found.append([])
            for n in batches:
                begin = time.thread_time()
                sized.loss(n).backward()
                found[-1].append(time.thread_time() - begin)
                after()
        return [median(seconds) for seconds in zip(*found[1:], strict=True)]

    plain = passes()
    sized.model.zero_grad()
    steps = Steps(sized)
    kfac = steps.kfac
    statistics = [
        max(0.0, seconds - without)
        for seconds, without in zip(passes(kfac.skip_step), plain, strict=True)
    ]
    sized.loss(batches[0]).backward()
    counts = kfac.take_statistics().counts
    rows = {x.name: rows / batches[0] for x, (_, rows) in zip(kfac.layers, counts, strict=True)}
    kfac.skip_step()
    phases = _phases(steps, batches[0])
    workload = _workload(
        sized,
        forward_backward=fit_line(batches, plain),
        factor_statistics=fit_line(batches, statistics),
        bytes_=_bytes_of(steps, batches, INVERSES_EVERY),
    )
    products = _products(kfac)
    scale = phases["products"] / max(sum(products.values()), 1e-12)
    workload = replace(
        workload,
        precondition_s=tuple(scale * products.get(x.name, 0.0) for x in sized.layers),
        factor_update_s=phases["factors"],
        bound_s=phases["bound"],
        optimizer_s=phases["optimizer"],
        packing_s=phases["packing"],
    )
    layers = kfac.layers
    kfac.close()
    costs, residual = _costs(sized, phases["decompositions"])
    kind = host_kind()

    def busy(config: Config) -> tuple[int, int]:
        batch = config.train.global_batch_size
        return busy_steps(layers, config.kfac, {n: round(r * batch) for n, r in rows.items()})

    return Profile(
        workload,
        replace(calibration, costs=costs),
        f"measured here ({kind['device']}, {kind['threads']} thread(s), torch {kind['torch']})",
        residual,
        busy,
        _spreading(sized, batches, rows, phases["with statistics"]) if is_quick else None,
    )


def _phases(steps: Steps, samples: int, count: int = 3 * INVERSES_EVERY) -> dict[str, float]:
    """Seconds of every part of a step, where it is due."""
    kfac, found = steps.kfac, defaultdict[str, list[float]](list)
    kfac.timers.clock = time.thread_time
    steps.whole(samples)  # warms up
    steps.exchange()
    for _ in range(count):
        kind = "plain"
        if kfac.steps % FACTORS_EVERY == 0:
            kind = "decomposing" if kfac.steps % INVERSES_EVERY == 0 else "averaging"
        begin = time.thread_time()
        steps.sized.loss(samples).backward()
        passed = time.thread_time()
        kfac.step()
        found[kind].append(time.thread_time() - passed)
        whole = passed - begin + kfac.timers.last["factors"]
        found["watched" if kfac.steps % FACTORS_EVERY == 1 else "unwatched"].append(whole)
        found["products"].append(kfac.timers.last["products"])
        begin = time.thread_time()
        steps.optimizer.step()
        found["optimizer"].append(time.thread_time() - begin)
        if kind != "plain":
            begin = time.thread_time()
            steps.exchange()
            found["packing"].append(time.thread_time() - begin)
        steps.optimizer.zero_grad()
    usual = {name: median(values) for name, values in found.items()}
    return {
        "products": usual["products"],
        "bound": max(0.0, usual["plain"] - usual["products"]),
        "factors": max(0.0, usual["averaging"] - usual["plain"]),
        "decompositions": max(0.0, usual["decomposing"] - usual["averaging"]),
        "optimizer": usual["optimizer"],
        "packing": usual["packing"],
        "with statistics": max(0.0, usual["watched"] - usual["unwatched"]),
    }


@dataclass(frozen=True)
class _Bytes:
    """Of one rank that holds all decompositions."""

    peaks: Mapping[int, float]
    """The most in a step, by samples, in ascending order."""
    exchanging: float
    """When statistics are sent."""
    decomposing: float
    """When new decompositions are sent, these not included."""


def _bytes_of(steps: Steps, batches: Sequence[int], count: int) -> _Bytes:
    """Measured in so many steps."""
    peaks = {}
    sizes = sorted({batches[0], -(-batches[1] // 2), *batches[1:]})
    held = defaultdict[str, dict[int, float]](dict)
    """By step, as a phase begins."""

    def look(phase: str) -> None:
        held[phase].setdefault(steps.kfac.steps, float(bytes_.now))

    with PeakBytes() as bytes_:
        for _ in range(count):  # meets all that is held
            steps.whole(batches[0])
        steps.kfac.on_phase = look
        for n in sizes:
            bytes_.peak = bytes_.now
            for _ in range(count):
                steps.whole(n)
            peaks[n] = float(bytes_.peak)
    steps.kfac.on_phase = None
    exchanging, decomposing = (
        max(held[phase].values(), default=0.0) for phase in ("factor_exchange", "decomposition")
    )
    new = [_second_order_bytes(steps.sized, [layer]) for layer in steps.sized.layers]
    due = max(new, default=0.0) if steps.spread else sum(new)
    return _Bytes(peaks, exchanging, decomposing - due)


def _spreading(
    sized: Sized,
    batches: Sequence[int],
    rows: Mapping[str, float],
    together_s: float,
    rounds: int = 3,
) -> Spreading:
    """Measured where statistics are spread as far as they can be.

    Args:
        rows: Of one sample, by layer.
        together_s: What they take in one step.
    """
    steps = Steps(sized, spread=True)
    kfac = steps.kfac
    kfac.timers.clock = time.thread_time
    # Offsets follow the rows: those of a batch that is large enough to spread all that can be.
    kfac.refresh.see({name: round(1e6 * r) for name, r in rows.items()})
    found = defaultdict[tuple[int, bool], list[float]](list)
    for _ in range(SPREAD_OVER * (rounds + 1)):
        at = kfac.steps
        kind = at % SPREAD_OVER, kfac.factors_due()
        begin = time.thread_time()
        sized.loss(batches[0]).backward()
        passed = time.thread_time() - begin
        kfac.step()
        if at >= SPREAD_OVER:
            found[kind].append(passed + kfac.timers.last["factors"])
        steps.optimizer.zero_grad()
    memory = _memory(_bytes_of(steps, batches, SPREAD_OVER), _held(sized))
    kfac.close()
    usual = {kind: median(values) for kind, values in found.items()}
    watched = [seconds for (_, is_due), seconds in usual.items() if is_due]
    plain = [seconds for (_, is_due), seconds in usual.items() if not is_due]
    if len(watched) < 2 or not plain:
        return Spreading(0.0, memory)
    apart_s = sum(watched) - len(watched) * median(plain)
    return Spreading(max(0.0, apart_s - together_s) / (len(watched) - 1), memory)


def _products(kfac: KFAC) -> dict[str, float]:
    """Seconds to precondition each layer on its own."""
    seconds = {}
    for layer, state in zip(kfac.layers, kfac.states, strict=True):
        if state.inverse_step < 0:
            continue
        gradient = torch.zeros(layer.gradient_shape, dtype=layer.dtype)
        stack = Stacks([layer])

        def once(
            stack: Stacks = stack,
            parts: Any = state.decomposition,
            gradient: Tensor = gradient,
        ) -> object:
            return stack.precondition([parts], [gradient], 1e-3, [None])

        seconds[layer.name] = least_seconds(once, repeats=2)
    return seconds


def _costs(sized: Sized, decompositions_s: float) -> tuple[CostModel, float]:
    """Costs of this host that add up to the measured time of the model's decompositions, and the ratio of
    that time to what random matrices of the usual widths had suggested."""
    widths = sorted({w for x in sized.layers for w in (x.a_dim, x.g_dim) if w > 512})[:2]
    method = sized.config.kfac.method
    costs = measure_costs(method, dimensions=(16, 64, 128, 256, 512, *widths), repeats=1)
    expected = sum(costs.a_seconds(x) + costs.g_seconds(x) for x in sized.layers)
    if not expected:
        return costs, 1.0
    ratio = decompositions_s / expected
    return CostModel(costs.c0 * ratio, costs.c1 * ratio, costs.p), ratio


def estimate(sized: Sized, device: Device, network: Line) -> Profile:
    """The workload on a device that is not here: counted operations and bytes over its rates.

    Operations are those of matrix products and convolutions, counted in passes of one and two samples
    with and without K-FAC's statistics; element-wise work is counted in passes over the bytes it
    touches.
    """
    counts, with_statistics, peaks = [], [], []
    for n in (1, 2):
        counts.append(_flops(lambda n=n: sized.loss(n).backward()))  # type: ignore[misc]
    sized.model.zero_grad()
    steps = Steps(sized)
    # Nothing is decomposed here, and wide factors take minutes: what is held is added.
    moments = 2 if sized.config.optimizer.name in ("adam", "adamw", "lamb") else 1
    is_bounded = sized.config.kfac.trust_region == "adaptive"
    for n in (1, 2):
        with PeakBytes() as bytes_:
            with_statistics.append(_flops(lambda n=n: steps.passes(n)))  # type: ignore[misc]
        steps.kfac.skip_step()
        kept = moments * sized.parameter_elements + is_bounded * weight_elements(sized.layers)
        peaks.append(bytes_.peak + 4.0 * kept + _held(sized))
    steps.kfac.close()
    # A vector of gradients, the optimizer's state and the sums of the statistics are held as well.
    stepping = 4.0 * ((3 + moments) * sized.parameter_elements + factor_elements(sized.layers))
    stepping += _held(sized)
    rate = device.flops_per_s
    more = [max(0.0, b - a) for a, b in zip(counts, with_statistics, strict=True)]
    size, layers, symmetric = 4.0, sized.layers, sized.config.kfac.symmetry_aware
    workload = _workload(
        sized,
        forward_backward=fit_line((1, 2), [c / rate for c in counts]),
        factor_statistics=fit_line((1, 2), [c / rate for c in more]),
        bytes_=_Bytes(dict(enumerate(peaks, 1)), stepping, stepping),
    )
    workload = replace(
        workload,
        factor_update_s=3 * size * factor_elements(layers) / device.bytes_per_s,
        bound_s=10 * size * weight_elements(layers) / device.bytes_per_s,
        optimizer_s=5 * size * sized.parameter_elements / device.bytes_per_s,
        packing_s=8 * size * factor_elements(layers, packed=symmetric) / device.bytes_per_s,
    )
    calibration = device.calibration(workload.method, network)
    return Profile(workload, calibration, f"estimated for {device.name} from data sheets")


def _flops(action: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        action()
    return float(counter.get_total_flops())


def _workload(
    sized: Sized,
    *,
    bytes_: _Bytes,
    forward_backward: Line,
    factor_statistics: Line,
) -> Workload:
    kfac = sized.config.kfac
    widths = {w for x in sized.layers for w in (x.a_dim, x.g_dim) if w <= CACHED_WIDTH}
    workload = Workload(
        layers=sized.layers,
        parameter_elements=sized.parameter_elements,
        forward_backward=forward_backward,
        factor_statistics=factor_statistics,
        step_bytes=(),
        method=kfac.method,
        precompute=kfac.precompute,
        colocate=kfac.colocate,
        index_bytes=4.0 * kfac.symmetry_aware * sum(w * w + triangle_size(w) for w in widths),
        bucket_bytes=kfac.bucket_mib * 2**20,
        symmetric=kfac.symmetry_aware,
    )
    return replace(with_intervals(workload, kfac), **_memory(bytes_, _held(sized)))


def _memory(bytes_: _Bytes, held: float) -> dict[str, Any]:
    """Fields of a workload."""
    points = list(bytes_.peaks.items())
    many = _through(*points[-2:])
    lines = [many, Line(min(bytes_.peaks.values()), 0.0)]
    if len(points) > 2 and (few := _through(*points[-3:-1])).slope < many.slope:
        lines.append(few)
    return {
        "step_bytes": tuple(Line(line.fixed - held, line.slope) for line in lines),
        "exchange_bytes": bytes_.exchanging - held,
        "decomposing_bytes": bytes_.decomposing - held,
    }


def _through(one: tuple[int, float], other: tuple[int, float]) -> Line:
    slope = (other[1] - one[1]) / (other[0] - one[0])
    return Line(one[1] - slope * one[0], slope)


def _held(sized: Sized) -> float:
    """Bytes of all factors and decompositions."""
    return 4.0 * factor_elements(sized.layers) + _second_order_bytes(sized, sized.layers)


def _second_order_bytes(sized: Sized, layers: Sequence[LayerShape]) -> float:
    kfac = sized.config.kfac
    return 4.0 * second_order_elements(layers, method=kfac.method, precompute=kfac.precompute)


def with_intervals(workload: Workload, options: KfacOptions) -> Workload:
    """The workload with the intervals that `options` begin with."""
    return replace(
        workload,
        factor_update_steps=int(value_at(options, "factor_update_steps", 0)),
        inverse_update_steps=int(value_at(options, "inverse_update_steps", 0)),
    )
