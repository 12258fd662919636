"""What planning assumes of devices nobody has measured: data sheets, and a share of them that is reached.

`plan.calibrate: true` measures instead, and `elastic-kfac plan` measures the machine it runs on unless
`--device` names another.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_kfac.errors import UsageError
from elastic_kfac.placement.costs import (
    CHOLESKY_ONE_CORE,
    EIGEN,
    EIGH_ONE_CORE,
    CostModel,
    Method,
)
from elastic_kfac.placement.simulator import Calibration, Line

NETWORK = Line(50e-6, 8.0 / 10e9)
"""10 Gbit/s with 50 µs of latency."""


@dataclass(frozen=True)
class Device:
    """A kind of device."""

    name: str
    flops_per_s: float
    """Rate of matrix products that training reaches."""
    bytes_per_s: float
    """Rate of element-wise passes over memory."""
    eigen: CostModel
    inverse: CostModel
    layer_s: float
    """Host and launch time to precondition one layer, however small."""

    def calibration(self, method: Method, network: Line = NETWORK) -> Calibration:
        """Its costs on a given network."""
        costs = self.eigen if method in EIGEN else self.inverse
        return Calibration(
            costs=costs,
            seconds_per_flop=1.0 / self.flops_per_s,
            network=network,
            seconds_per_layer=self.layer_s,
            seconds_per_copied_byte=4.0 / self.bytes_per_s,
        )


def _gpu(name: str, tera_flops: float, tera_bytes_per_s: float) -> Device:
    """40 % of the data sheet's TF32 (V100: FP32) rate, 70 % of its memory rate; dense symmetric
    eigenproblems are bound by memory and launches, so their cost follows the memory rate."""
    slower = 3.35 / tera_bytes_per_s
    return Device(
        name,
        0.4e12 * tera_flops,
        0.7e12 * tera_bytes_per_s,
        CostModel(2.0e-3, 8.0e-12 * slower, 3.0),
        CostModel(3.0e-4, 4.0e-13 * slower, 3.0),
        60e-6,
    )


DEVICES = {
    device.name: device
    for device in (
        Device("cpu", 50e9, 10e9, EIGH_ONE_CORE, CHOLESKY_ONE_CORE, 25e-6),
        _gpu("v100", 15.7, 0.9),
        _gpu("a100", 156.0, 1.56),
        _gpu("h100", 494.0, 3.35),
    )
}
"""One AVX2 core, of which only decompositions were measured, and GPUs by the data sheets of their SXM
forms (not measured)."""


def device_named(name: str) -> Device:
    """Raises:
    UsageError: If there is no such device.
    """
    try:
        return DEVICES[name]
    except KeyError:
        raise UsageError("unknown device", given=name, allowed=", ".join(DEVICES)) from None


def stored_calibration(method: Method, device_type: str = "cpu") -> Calibration:
    """The costs used before anything was measured: one CPU core, or an A100."""
    return DEVICES["a100" if device_type == "cuda" else "cpu"].calibration(method)
