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
from elastic_kfac.placement.simulator import Line, device_bytes, predict_step
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


def _is_on_grid(config: Config) -> bool:
    """Whether K-FAC works on a grid of ranks, whose placement the model tells."""
    return config.kfac.enabled and config.optimizer.name != "sharded_kfac"


class Emulator:
    """Predicts the average step of any configuration; measures every model and method once."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._profiles: dict[str, Profile] = {}
        self._known: dict[str, tuple[float, float | None]] = {}

    def step_seconds(self, config: Config) -> float:
        """Predicted seconds of the average step on `links.world_size` ranks."""
        return self._predicted(config)[0]

    def memory_bytes(self, config: Config) -> float | None:
        """Predicted device memory of the rank that holds most; None where that is not K-FAC's
        on a grid."""
        return self._predicted(config)[1]

    def _predicted(self, config: Config) -> tuple[float, float | None]:
        key = config.model_dump_json()
        if key not in self._known:
            sized = Sized.of(config)
            self._known[key] = self._step_seconds(sized), self._memory_bytes(sized)
        return self._known[key]

    def _micro_batch(self, config: Config) -> int:
        share = -(-config.train.global_batch_size // self._links.world_size)
        return min(config.train.micro_batch_size or share, share)

    def _memory_bytes(self, sized: Sized) -> float | None:
        if not _is_on_grid(sized.config):
            return None
        profile = self._measured(sized)
        plan = sized.plan(self._links.world_size, calibration=profile.calibration)
        work = profile.workload_of(sized.config)
        share = -(-sized.config.train.global_batch_size // self._links.world_size)
        micro = self._micro_batch(sized.config)
        return device_bytes(work, plan, micro, accumulates=micro < share)

    def _step_seconds(self, sized: Sized) -> float:
        ranks, config = self._links.world_size, sized.config
        batch = config.train.global_batch_size
        share, micro = -(-batch // ranks), self._micro_batch(config)
        profile = self._measured(sized)
        if not _is_on_grid(config):
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
