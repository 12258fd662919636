"""Seconds per step on an emulated network: measured computation, given links.

On one machine all ranks share its cores and its memory bus, so a placement does not cost what it costs on
a cluster. A search over placements therefore counts the steps of a real training and multiplies them by
the predicted time of a step, from costs measured once on this machine and from the latency and bandwidth
in the search space.
"""

from __future__ import annotations

from dataclasses import replace

from elastic_kfac.config import Config
from elastic_kfac.experiments.search_space import Links
from elastic_kfac.kfac.calibration import measured
from elastic_kfac.placement.simulator import Line, predict_step
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.runs.profile import Profile, measure, with_intervals


class Emulator:
    """Predicts the average step of any configuration; measures every model and method once."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._profiles: dict[str, Profile] = {}

    def step_seconds(self, config: Config) -> float:
        """Predicted seconds of the average step on `links.world_size` ranks."""
        ranks, sized = self._links.world_size, Sized.of(config)
        batch = config.train.global_batch_size
        share = -(-batch // ranks)
        micro = min(config.train.micro_batch_size or share, share)
        profile = self._measured(sized)
        if not config.kfac.enabled or config.optimizer.name == "sharded_kfac":
            work = profile.workload
            computation = -(-share // micro) * work.forward_backward.at(micro) + work.optimizer_s
            exchange = profile.calibration.all_reduce_seconds(ranks, sized.parameter_elements * 4)
            return computation + exchange
        step = predict_step(
            with_intervals(profile.workload, config.kfac),
            profile.calibration,
            sized.plan(ranks, calibration=profile.calibration),
            global_batch_size=batch,
            micro_batch_size=micro,
        )
        return step.total

    def _measured(self, sized: Sized) -> Profile:
        """Of a configuration that differs at most in placement, intervals and damping."""
        config, kfac = sized.config, sized.config.kfac
        key = f"{config.data.shards} {config.model.model_dump_json()} {kfac.enabled}"
        key += f" {kfac.method} {kfac.precompute} {kfac.max_factor_dim} {kfac.skip_layers}"
        if key not in self._profiles:
            network = Line(self._links.latency_s, 8.0 / (self._links.gbit_per_s * 1e9))
            calibration = replace(
                measured(kfac.method), network=network, ranks_per_node=self._links.ranks_per_node
            )
            self._profiles[key] = measure(sized, calibration)
        return self._profiles[key]
