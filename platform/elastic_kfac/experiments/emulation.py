"""Seconds per step on an emulated network: measured computation, given links.

On one machine all ranks share its cores and its memory bus, so a placement does not cost what it costs on
a cluster. A search over placements therefore counts the steps of a real training and multiplies them by
the predicted time of a step, from costs measured once on this machine and from the latency and bandwidth
in the search space.
"""

from __future__ import annotations

from functools import lru_cache

from elastic_kfac.config import Config
from elastic_kfac.experiments.search_space import Links
from elastic_kfac.placement.costs import Method
from elastic_kfac.placement.simulator import Calibration, Line, predict_step
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.runs.prediction import (
    Passes,
    measure_calibration,
    measure_passes,
    workload_of,
)

_BATCHES = (8, 32)
"""Sizes at which passes are measured."""


class Emulator:
    """Predicts the average step of any configuration; measures every model and method once."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._calibration = lru_cache(None)(self._calibrated)
        self._passes: dict[str, Passes] = {}

    def step_seconds(self, config: Config) -> float:
        """Predicted seconds of the average step on `links.world_size` ranks."""
        ranks, sized = self._links.world_size, Sized.of(config)
        batch = config.train.global_batch_size
        share = -(-batch // ranks)
        micro = min(config.train.micro_batch_size or share, share)
        calibration, passes = self._calibration(config.kfac.method), self._measured(sized)
        if not config.kfac.enabled or config.optimizer.name == "sharded_kfac":
            computation = -(-share // micro) * passes.forward_backward.at(micro)
            exchange = calibration.all_reduce_seconds(ranks, sized.parameter_elements * 4)
            return computation + exchange
        step = predict_step(
            workload_of(sized, passes),
            calibration,
            sized.plan(ranks),
            global_batch_size=batch,
            micro_batch_size=micro,
        )
        return step.total

    def _calibrated(self, method: Method) -> Calibration:
        network = Line(self._links.latency_s, 8.0 / (self._links.gbit_per_s * 1e9))
        return measure_calibration(method, network, self._links.ranks_per_node)

    def _measured(self, sized: Sized) -> Passes:
        key = f"{sized.config.data.shards} {sized.config.model.model_dump_json()}"
        if key not in self._passes:
            self._passes[key] = measure_passes(sized, _BATCHES)
        return self._passes[key]
