"""Seconds per step on an emulated network, with measured computation.

On one machine a placement has none of the communication costs of a cluster. A search over placements
therefore counts the steps of a real training and multiplies them by the simulator's prediction of a
step, from costs measured once on this machine and the latency and bandwidth in the search space.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from elastic_kfac.config import Config
from elastic_kfac.data.manifest import ShardSet
from elastic_kfac.data.stream import SampleStream
from elastic_kfac.experiments.search_space import Links
from elastic_kfac.kfac.calibration import measure_costs
from elastic_kfac.kfac.options import value_at
from elastic_kfac.kfac.shapes import layer_shape
from elastic_kfac.placement.simulator import Calibration, Line, Workload, fit_line, predict_step
from elastic_kfac.runs.feasibility import imagined_paths

_BATCHES = (8, 32)
"""Batch sizes of the measured passes."""


class Emulator:
    """Predicts the average step of a configuration; measures every model and method once."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._network = Line(links.latency_s, 8.0 / (links.gbit_per_s * 1e9))
        self._seconds_per_flop: float | None = None
        self._calibrations: dict[str, Calibration] = {}
        self._passes: dict[str, tuple[Line, Line]] = {}

    def step_seconds(self, config: Config) -> float:
        """Predicted seconds of the average step on `links.world_size` ranks."""
        links, kfac = self._links, config.kfac
        batch = config.train.global_batch_size
        share = -(-batch // links.world_size)
        micro = min(config.train.micro_batch_size or share, share)
        calibration = self._calibration(config)
        forward_backward, statistics = self._measured(config)
        for model, preconditioner in imagined_paths(config, [links.world_size]):
            parameters = sum(each.numel() for each in model.parameters())
            if preconditioner is None or preconditioner.sums_gradients:
                passes = -(-share // micro) * forward_backward.at(micro)
                return passes + calibration.all_reduce_seconds(links.world_size, parameters * 4)
            workload = Workload(
                layers=tuple(layer_shape(layer) for layer in preconditioner.layers),
                parameter_elements=parameters,
                forward_backward=forward_backward,
                factor_statistics=statistics,
                activation_bytes=Line(0.0, 0.0),
                factor_update_steps=int(value_at(kfac, "factor_update_steps", 0)),
                inverse_update_steps=int(value_at(kfac, "inverse_update_steps", 0)),
                method=kfac.method,
                precompute=kfac.precompute,
                colocate=kfac.colocate,
            )
            step = predict_step(
                workload,
                calibration,
                preconditioner.plan,
                global_batch_size=batch,
                micro_batch_size=micro,
            )
        return step.total

    def _calibration(self, config: Config) -> Calibration:
        method = config.kfac.method
        if self._seconds_per_flop is None:
            self._seconds_per_flop = _seconds_per_flop()
        if method not in self._calibrations:
            self._calibrations[method] = Calibration(
                costs=measure_costs(method).model,
                seconds_per_flop=self._seconds_per_flop,
                network=self._network,
                ranks_per_node=self._links.ranks_per_node,
            )
        return self._calibrations[method]

    def _measured(self, config: Config) -> tuple[Line, Line]:
        key = f"{config.data.shards} {config.model.model_dump_json()}"
        if key not in self._passes:
            self._passes[key] = _measure_passes(config)
        return self._passes[key]


def _measure_passes(config: Config) -> tuple[Line, Line]:
    """Seconds of a pass over x samples: forward and backward, and statistics on top."""
    shards = ShardSet.open(f"{config.data.shards.rstrip('/')}/{config.data.train_split}")
    shape = SampleStream(shards, seed=config.train.seed).image_shape
    on = config.model_copy(update={"kfac": config.kfac.model_copy(update={"enabled": True})})
    with_statistics = plain = [0.0, 0.0]
    for model, kfac in imagined_paths(on, [1]):
        assert kfac is not None
        with_statistics = [_pass_seconds(model, shape, n, kfac.skip_step) for n in _BATCHES]
        kfac.close()
        plain = [_pass_seconds(model, shape, n, lambda: None) for n in _BATCHES]
    more = [max(0.0, a - b) for a, b in zip(with_statistics, plain, strict=True)]
    return fit_line(_BATCHES, plain), fit_line(_BATCHES, more)


def _pass_seconds(
    model: nn.Module, shape: tuple[int, int, int], size: int, after: Callable[[], object]
) -> float:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, *shape, generator=generator)

    def one() -> None:
        model(images).logsumexp(1).mean().backward()

    return _least_seconds(one, after)


def _seconds_per_flop(size: int = 256) -> float:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    return _least_seconds(lambda: matrix @ matrix, lambda: None) / (2 * size**3)


def _least_seconds(
    action: Callable[[], object], after: Callable[[], object], repeats: int = 5
) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
        after()
    return min(times[1:])
