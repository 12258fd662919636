"""What steps cost on the present ranks, measured and by the model of `placement`, for the report."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.kfac.kfac import KFAC
from elastic_kfac.kfac.options import value_at
from elastic_kfac.kfac.shapes import layer_shape
from elastic_kfac.kfac.timers import Timers
from elastic_kfac.placement.choice import kfac_workload
from elastic_kfac.placement.devices import stored_calibration
from elastic_kfac.placement.simulator import predict_step
from elastic_kfac.placement.traffic import memory_elements, traffic_per_step

_PURPOSES = {
    "gradients": ("gradients", "totals"),
    "statistics": ("kfac/factors", "kfac/counts"),
    "decompositions": ("kfac/second_order",),
    "preconditioned gradients": ("kfac/gradients",),
}
"""Tags of collectives by what travels."""

Numbers = dict[str, float]


class StepCosts:
    """Sums over the steps of one world, but its first, which warms up.

    Attributes:
        timers: Of the parts of a step outside K-FAC.
    """

    def __init__(self) -> None:
        self.timers = Timers()
        self._steps, self._elapsed = -1, 0.0
        self._begin: tuple[Numbers, Numbers] = {}, {}
        """Seconds and bytes after the first step."""
        self._now = self._begin
        """The same after the newest, without what a step that failed has begun."""

    def enter(self) -> None:
        """Begins another world."""
        self._steps = -1

    def saw(self, communicator: Communicator, kfac: KFAC | None, seconds: float) -> None:
        """Takes note of a step."""
        self._steps += 1
        self._now = self._spent(kfac), _received(communicator)
        if self._steps == 0:
            self._elapsed, self._begin = 0.0, self._now
        else:
            self._elapsed += seconds

    def _spent(self, kfac: KFAC | None) -> Numbers:
        return {**self.timers.seconds, **({} if kfac is None else kfac.seconds)}

    def row(
        self,
        communicator: Communicator,
        kfac: KFAC | None,
        parameter_elements: int,
        device: torch.device,
        *,
        alone: bool = False,
    ) -> dict[str, Any] | None:
        """Seconds and bytes of the mean step, and memory, as fields of an event; None without steps.

        Seconds are those of this rank, bytes the mean over ranks, memory that of the fullest. Collective,
        unless `alone`: where peers are lost, all are those of this rank.
        """
        if self._steps < 1:
            return None
        seconds, own = (
            {name: (value - before.get(name, 0.0)) / self._steps for name, value in now.items()}
            for before, now in zip(self._begin, self._now, strict=True)
        )
        held = {} if kfac is None else kfac.memory_usage()
        mine = own, {**held, **_peak(device)}
        everybody = [mine] if alone else communicator.all_gather_object(mine, tag="costs")
        bytes_, memory = zip(*everybody, strict=True)
        return {
            "steps": self._steps,
            "step_s": self._elapsed / self._steps,
            "seconds": seconds,
            "decomposed_elsewhere": 0 if kfac is None else kfac.refresh.ahead.work.elsewhere,
            "bytes": {n: sum(b[n] for b in bytes_) / len(bytes_) for n in own},
            "memory": {
                name: max(part.get(name, 0.0) for part in memory)
                for name in sorted({name for part in memory for name in part})
            },
            "model": {} if kfac is None else _model(kfac, parameter_elements),
        }


def _received(communicator: Communicator) -> Numbers:
    traffic = communicator.counters.snapshot()
    return {
        purpose: float(sum(traffic[tag].received_bytes for tag in tags if tag in traffic))
        for purpose, tags in _PURPOSES.items()
    }


def _peak(device: torch.device) -> Numbers:
    """Bytes that the process, or its device, held at most."""
    if device.type == "cuda":
        return {"device peak": float(torch.cuda.max_memory_allocated(device))}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"process peak": float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)}


def _model(kfac: KFAC, parameter_elements: int) -> Mapping[str, Numbers]:
    """The same by the model, as far as it knows it without a profile of the passes; for the grid."""
    if kfac.sums_gradients:
        return {}
    options, plan, layers = kfac.options, kfac.plan, kfac.layers
    known = kfac.calibration or stored_calibration(options.method, layers[0].device.type)
    shapes, size = [layer_shape(layer) for layer in layers], layers[0].dtype.itemsize
    intervals: dict[str, Any] = {
        name: int(value_at(options, name, kfac.steps))
        for name in ("factor_update_steps", "inverse_update_steps")
    }
    form: dict[str, Any] = {"method": options.method, "precompute": options.precompute}
    workload = kfac_workload(shapes, element_bytes=size, **intervals, **form)
    workload = replace(workload, parameter_elements=parameter_elements)
    step = predict_step(workload, known, plan, global_batch_size=1, micro_batch_size=1)
    traffic = traffic_per_step(
        plan,
        shapes,
        parameter_elements=parameter_elements,
        symmetric=options.symmetry_aware,
        **intervals,
        **form,
    )
    elements = max(memory_elements(plan, shapes, **form))
    return {
        "seconds": {
            "gradients": step.gradient_all_reduce,
            "decompositions": step.decompositions,
            "preconditioning": step.precondition
            + step.preconditioned_broadcast
            + step.second_order_broadcast,
        },
        "bytes": {
            "gradients": float(traffic.gradients) * size,
            "statistics": float(traffic.factors) * size,
            "decompositions": float(traffic.second_order) * size,
            "preconditioned gradients": float(traffic.preconditioned_gradients) * size,
        },
        "memory": {"factors and decompositions": float(elements * size)},
    }
