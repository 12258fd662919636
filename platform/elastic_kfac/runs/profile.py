"""What a step of a configured model costs: measured on this machine, or estimated for a named device.

Measured are the model's passes and K-FAC's own step, phase by phase, on one rank that holds everything;
what other ranks hold and do follows from shapes (`placement.simulator`).
"""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.stacks import Stacks
from elastic_kfac.kfac.calibration import host_kind, least_seconds, measure_costs
from elastic_kfac.kfac.kfac import KFAC
from elastic_kfac.kfac.options import value_at
from elastic_kfac.placement.costs import (
    CostModel,
    factor_elements,
    second_order_elements,
    weight_elements,
)
from elastic_kfac.placement.devices import Device
from elastic_kfac.placement.simulator import Calibration, Line, Workload, fit_line
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.training.first_order import make_optimizer
from elastic_kfac.training.preconditioner import make_preconditioner

_FACTORS_EVERY, _INVERSES_EVERY = 2, 4
"""Intervals while measuring: of eight steps four are plain, four move factors, two decompose."""


class PeakBytes(TorchDispatchMode):
    """Bytes of all tensors that operations return and somebody still holds: `now`, and at most `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key)


class _Steps:
    """One rank's training steps of a configuration, on random samples."""

    def __init__(self, sized: Sized) -> None:
        config = sized.config
        kfac = {
            "enabled": True,
            "refresh": "fixed",
            "stagger": False,
            "factor_update_steps": _FACTORS_EVERY,
            "inverse_update_steps": _INVERSES_EVERY,
        }
        first_order: dict[str, object] = {"lr": 1e-6}
        if config.optimizer.name == "sharded_kfac":
            first_order["name"] = "sgd"
        optimizer = config.optimizer.model_copy(update=first_order)
        changes = {
            "kfac": config.kfac.model_copy(update=kfac),
            # On one rank alone the state may not fit the budget of many.
            "plan": config.plan.model_copy(update={"memory_budget_gib": None, "calibrate": False}),
            "optimizer": optimizer,
        }
        self.sized = sized
        self.optimizer = make_optimizer(sized.model, optimizer)
        made = make_preconditioner(
            sized.model, self.optimizer, config.model_copy(update=changes), Communicator.solo()
        )
        assert made is not None
        self.kfac: KFAC = made

    def whole(self, samples: int) -> None:
        """Passes, K-FAC and optimizer."""
        self.sized.loss(samples).backward()
        self.kfac.step()
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Profile:
    """What the planner knows of a configuration on a device."""

    workload: Workload
    calibration: Calibration
    basis: str
    """Where the figures come from, in words."""
    residual: float | None = None
    """Measured time of the model's decompositions over that of random matrices of usual widths, which
    the costs are corrected by; None if nothing was measured."""


def measure(sized: Sized, calibration: Calibration) -> Profile:
    """Runs steps of the configuration on this machine; `calibration` gives the links."""
    begin = time.thread_time()
    sized.loss(2).backward()
    is_quick = time.thread_time() - begin < 1.0
    largest = max(3, min(128, sized.config.train.global_batch_size))
    batches = (max(1, largest // 8), max(2, largest // 2), largest) if is_quick else (1, 2, 3)
    repeats = 3 if is_quick else 1

    def passes(n: int) -> float:
        return least_seconds(lambda: sized.loss(n).backward(), repeats=repeats)

    plain = [passes(n) for n in batches]
    sized.model.zero_grad()
    steps = _Steps(sized)
    kfac = steps.kfac
    statistics = []
    for n, without in zip(batches, plain, strict=True):
        seconds = []
        for _ in range(repeats + 1):
            begin = time.thread_time()
            sized.loss(n).backward()
            seconds.append(time.thread_time() - begin)
            kfac.skip_step()
        statistics.append(max(0.0, min(seconds) - without))
    phases = _phases(steps, batches[0])
    peaks = []
    for n in batches:
        with PeakBytes() as bytes_:
            for _ in range(_INVERSES_EVERY):
                steps.whole(n)
        peaks.append(bytes_.peak)
    workload = _workload(
        sized,
        forward_backward=fit_line(batches, plain),
        factor_statistics=fit_line(batches, statistics),
        peaks=dict(zip(batches, peaks, strict=True)),
    )
    products = _products(kfac)
    scale = phases["products"] / max(sum(products.values()), 1e-12)
    workload = replace(
        workload,
        precondition_s=tuple(scale * products.get(x.name, 0.0) for x in sized.layers),
        factor_update_s=phases["factors"],
        bound_s=phases["bound"],
        optimizer_s=phases["optimizer"],
    )
    kfac.close()
    costs, residual = _costs(sized, phases["decompositions"])
    kind = host_kind()
    return Profile(
        workload,
        replace(calibration, costs=costs),
        f"measured here ({kind['device']}, {kind['threads']} thread(s), torch {kind['torch']})",
        residual,
    )


def _phases(steps: _Steps, samples: int, count: int = 3 * _INVERSES_EVERY) -> dict[str, float]:
    """Seconds of every part of a step, where it is due."""
    kfac, found = steps.kfac, defaultdict[str, list[float]](list)
    kfac.timers.clock = time.thread_time
    steps.whole(samples)  # warms up
    for _ in range(count):
        kind = "plain"
        if kfac.steps % _FACTORS_EVERY == 0:
            kind = "decomposing" if kfac.steps % _INVERSES_EVERY == 0 else "averaging"
        steps.sized.loss(samples).backward()
        begin = time.thread_time()
        kfac.step()
        found[kind].append(time.thread_time() - begin)
        found["products"].append(kfac.timers.last["products"])
        begin = time.thread_time()
        steps.optimizer.step()
        found["optimizer"].append(time.thread_time() - begin)
        steps.optimizer.zero_grad()
    least = {name: min(values) for name, values in found.items()}
    return {
        "products": least["products"],
        "bound": max(0.0, least["plain"] - least["products"]),
        "factors": max(0.0, least["averaging"] - least["plain"]),
        "decompositions": max(0.0, least["decomposing"] - least["averaging"]),
        "optimizer": least["optimizer"],
    }


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
    steps = _Steps(sized)
    sized.loss(1).backward()  # gradients exist from here on
    steps.kfac.skip_step()
    for n in (1, 2):
        with PeakBytes() as bytes_:
            with_statistics.append(_flops(lambda n=n: sized.loss(n).backward()))  # type: ignore[misc]
        steps.kfac.skip_step()
        # Nothing is decomposed here, and wide factors take minutes: what is held is added.
        moments = 2 if sized.config.optimizer.name in ("adam", "adamw", "lamb") else 1
        peaks.append(bytes_.peak + (1 + moments) * 4.0 * sized.parameter_elements + _held(sized))
    steps.kfac.close()
    rate = device.flops_per_s
    more = [max(0.0, b - a) for a, b in zip(counts, with_statistics, strict=True)]
    size, layers = 4.0, sized.layers
    workload = _workload(
        sized,
        forward_backward=fit_line((1, 2), [c / rate for c in counts]),
        factor_statistics=fit_line((1, 2), [c / rate for c in more]),
        peaks=dict(enumerate(peaks, 1)),
    )
    workload = replace(
        workload,
        factor_update_s=3 * size * factor_elements(layers) / device.bytes_per_s,
        bound_s=10 * size * weight_elements(layers) / device.bytes_per_s,
        optimizer_s=5 * size * sized.parameter_elements / device.bytes_per_s,
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
    peaks: Mapping[int, float],
    forward_backward: Line,
    factor_statistics: Line,
) -> Workload:
    """`peaks`: the bytes of one rank that holds all decompositions, by samples, in ascending order."""
    kfac, held = sized.config.kfac, _held(sized)
    # With few samples the step needs more than the forward pass: the line is that of the larger ones.
    (n1, low), (n2, high) = list(peaks.items())[-2:]
    memory = Line(high - (slope := (high - low) / (n2 - n1)) * n2, slope)
    workload = Workload(
        layers=sized.layers,
        parameter_elements=sized.parameter_elements,
        forward_backward=forward_backward,
        factor_statistics=factor_statistics,
        activation_bytes=Line(0.0, memory.slope),
        base_bytes=memory.fixed - held,
        least_bytes=min(peaks.values()) - held,
        method=kfac.method,
        precompute=kfac.precompute,
        colocate=kfac.colocate,
    )
    return with_intervals(workload, kfac)


def _held(sized: Sized) -> float:
    """Bytes of all factors and decompositions."""
    kfac = sized.config.kfac
    return 4.0 * (
        factor_elements(sized.layers)
        + second_order_elements(sized.layers, method=kfac.method, precompute=kfac.precompute)
    )


def with_intervals(workload: Workload, options: KfacOptions) -> Workload:
    """The workload with the intervals that `options` begin with."""
    return replace(
        workload,
        factor_update_steps=int(value_at(options, "factor_update_steps", 0)),
        inverse_update_steps=int(value_at(options, "inverse_update_steps", 0)),
    )
