"""Seconds per step on an emulated network: measured computation, given links.

On one machine all ranks share its cores and its memory bus, so a placement does not cost what it costs on
a cluster. A search over placements therefore counts the steps of a real training and multiplies them by
the predicted time of a step, from costs measured once on this machine and from the latency and bandwidth
in the search space.

Points that differ in nothing but `PLACEMENT` have the same trajectory: one training tells the steps of
all of them, and the model their seconds.
"""

from __future__ import annotations

import json
from dataclasses import replace

from elastic_kfac.config import Config
from elastic_kfac.experiments.search_space import Links
from elastic_kfac.kfac.calibration import measured
from elastic_kfac.placement.choice import kfac_workload
from elastic_kfac.placement.simulator import Line, predict_step
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.runs.profile import Profile, measure, with_intervals

PLACEMENT = (
    "kfac.grad_worker_frac",
    "kfac.colocate",
    "kfac.symmetry_aware",
    "kfac.bucket_mib",
    "sharded.v_method",
    "plan.memory_budget_gib",
    "plan.calibrate",
    "plan.margin",
)
"""Keys that change who computes what and how it is sent, and never what is computed."""


def trajectory(config: Config) -> str:
    """Equal for configurations that compute the same steps."""
    values = config.model_dump(mode="json")
    for key in PLACEMENT:
        section, name = key.split(".")
        values[section].pop(name)
    return json.dumps(values, sort_keys=True)


def placed_step_seconds(config: Config, ranks: int) -> float:
    """Predicted seconds per step of what a placement changes, on stored links."""
    sized, kfac = Sized.of(config), config.kfac
    workload = kfac_workload(
        sized.layers, method=kfac.method, precompute=kfac.precompute, colocate=kfac.colocate
    )
    calibration = measured(kfac.method)
    plan = sized.plan(ranks, calibration=calibration)
    step = predict_step(
        with_intervals(workload, kfac),
        calibration,
        plan,
        global_batch_size=ranks,
        micro_batch_size=1,
    )
    return step.placed


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
            profile.workload_of(config),
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
