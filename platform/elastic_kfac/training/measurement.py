"""Telemetry of a rank: time per phase, CPU time, traffic, curvature.

The probe is a callback that reads existing counters; it synchronises a device only when values are
requested. On a GPU the phases are host times: a kernel that is still running delays a later phase.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from elastic_kfac.data.stream import SampleStream
from elastic_kfac.observability.telemetry import Labels, Values
from elastic_kfac.training.callbacks import Callback, Point, Trainer

if TYPE_CHECKING:
    from elastic_kfac.curvature.layer import LayerState
    from elastic_kfac.kfac.kfac import KFAC
    from elastic_kfac.training.rank import RankTrainer

_PHASES: Mapping[Point, str] = {
    "step_begin": "forward_backward",
    "backward_done": "communication",
    "gradients_exchanged": "optimizer",
    "committed": "",
    "evaluation": "evaluation",
    "capture": "snapshot",
    "recovery": "",
}
"""Phase that begins at each point; the remaining points lie inside a phase."""


class RankProbe(Callback):
    """Measures one rank across all worlds that it joins."""

    def __init__(self) -> None:
        self.step = 0
        """The step in progress, otherwise the last committed one."""
        self._trainer: RankTrainer | None = None
        self._phase = ""
        self._phase_began = 0.0
        self._phase_s: dict[str, float] = defaultdict(float)
        self._step_cpu_began = 0.0
        self._step_cpu_s = 0.0
        self._own_cpu_s = 0.0
        self._skipped = 0
        self._preconditioned = True
        self._inverse_steps: dict[str, int] = {}
        self._inverse_updates = 0.0
        self._reported: dict[tuple[str, Labels], float] = {}
        self._is_new_world = True
        self._exposed_s = 0.0
        self._waited: tuple[int, float] = (0, 0.0)
        self._saved: Values = {}

    def on_start(self, trainer: Trainer) -> None:
        self._trainer = cast("RankTrainer", trainer)

    def on_point(self, point: Point, step: int) -> None:
        now = time.perf_counter()
        self.step = step
        phase = _PHASES.get(point)
        if phase is not None:
            if self._phase:
                self._phase_s[self._phase] += now - self._phase_began
            self._phase, self._phase_began = phase, now
        if point == "step_begin":
            if self._is_new_world:
                self._enter_world()
            self._preconditioned = False
            self._step_cpu_began = time.process_time()
        elif point == "preconditioned":
            self._preconditioned = True
        elif point == "committed":
            self._step_cpu_s += time.process_time() - self._step_cpu_began
            self._skipped += not self._preconditioned
            self._count_decompositions()
        elif point == "recovery":
            self._is_new_world = True

    @contextmanager
    def own_cpu(self) -> Iterator[None]:
        """Adds the CPU time of the calling thread to the cost of telemetry."""
        begin = time.thread_time()
        try:
            yield
        finally:
            self._own_cpu_s += time.thread_time() - begin

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0 of the current world."""
        return self._trainer is not None and self._trainer.communicator.rank == 0

    def snapshot_replicated(self) -> None:
        """Records that a snapshot has reached a replica."""
        self._saved["snapshot_timestamp_s"] = {(): time.time()}

    def checkpoint_written(self, num_bytes: int, elapsed_s: float) -> None:
        """Records a durable checkpoint."""
        self._saved["checkpoint_timestamp_s"] = {(): time.time()}
        self._saved["checkpoint_time_s"] = {(): elapsed_s}
        self._saved["checkpoint_bytes"] = {(): float(num_bytes)}

    def run_values(self) -> Values:
        """Values that rank 0 reports: gauges, and the growth of counters since the last call."""
        trainer = self._trainer
        if trainer is None or self._is_new_world:
            return {}
        values = {
            name: {labels: self._growth(name, labels, total) for labels, total in totals.items()}
            for name, totals in self._totals(trainer).items()
        }
        columns = {} if trainer.kfac is None else trainer.kfac.metrics()
        for name in ("damping", "kl_clip_scale", "inverse_age_steps"):
            if name in columns:
                values[name] = {(): float(columns[name])}
        states = () if trainer.kfac is None else trainer.kfac.states
        values["condition_number"] = condition_numbers(states, columns.get("damping", 0))
        return {**values, **self._saved}

    def rank_values(self) -> Values:
        """Values of this rank: gauges and running totals."""
        trainer = self._trainer
        values: Values = {
            "step_cpu_s": {(): self._step_cpu_s},
            "telemetry_cpu_s": {(): self._own_cpu_s},
        }
        if trainer is None:
            return values
        counters = trainer.communicator.counters
        world, waited = self._waited
        # Every world has new counters.
        self._exposed_s += counters.waited_s - (waited if world == id(counters) else 0.0)
        self._waited = (id(counters), counters.waited_s)
        values["communication_exposed_s"] = {(): self._exposed_s}
        if trainer.slow is not None:
            factor = trainer.slow.factors.get(trainer.communicator.rank, 0.0)
            values["slow_rank_factor"] = {(): factor}
        if trainer.kfac is not None:
            usage = trainer.kfac.memory_usage()
            usage.pop("total")
            values["memory_bytes"] = {(part,): float(held) for part, held in usage.items()}
        for name, count in _data_counts(trainer).items():
            values[name] = {(): float(count)}
        return values

    # ---- inside ----------------------------------------------------------------------------

    def _enter_world(self) -> None:
        # Counters that were restored with the state have been reported by the previous world.
        assert self._trainer is not None
        self._is_new_world = False
        for name, totals in self._totals(self._trainer).items():
            for labels, total in totals.items():
                self._reported[name, labels] = total
        self._inverse_steps = _inverse_steps(self._trainer.kfac)

    def _growth(self, name: str, labels: Labels, total: float) -> float:
        before = self._reported.get((name, labels), 0.0)
        self._reported[name, labels] = total
        return max(0.0, total - before)

    def _totals(self, trainer: RankTrainer) -> Values:
        traffic = trainer.communicator.counters.snapshot()
        totals: Values = {
            "phase_time_s": self._phases(trainer),
            "skipped_steps": {(): float(self._skipped)},
            "inverse_updates": {(): self._inverse_updates},
            "communication_bytes": {(tag,): t.payload_bytes for tag, t in traffic.items()},
            "communication_calls": {(tag,): t.calls for tag, t in traffic.items()},
            "communication_errors": {(): float(trainer.communicator.counters.errors)},
        }
        kfac = trainer.kfac
        if kfac is not None:
            metrics = kfac.metrics()
            totals["factor_updates"] = {(): metrics["factor_updates"]}
            totals["fallbacks"] = {(): metrics["fallbacks"]}
            totals["nonfinite_factors"] = {(): float(kfac.counters["discarded_statistics"])}
        return totals

    def _phases(self, trainer: RankTrainer) -> dict[Labels, float]:
        spent = defaultdict(float, self._phase_s)
        # The dataset and K-FAC measure their own parts of these two phases.
        data_s = min(_data_counts(trainer).get("stall_s", 0.0), spent["forward_backward"])
        spent["data"] += data_s
        spent["forward_backward"] -= data_s
        if trainer.kfac is not None:
            for phase, elapsed_s in trainer.kfac.seconds.items():
                spent[phase] += elapsed_s
                spent["optimizer"] -= elapsed_s
        return {(phase,): elapsed_s for phase, elapsed_s in spent.items()}

    def _count_decompositions(self) -> None:
        assert self._trainer is not None
        steps = _inverse_steps(self._trainer.kfac)
        changed = [name for name, step in steps.items() if self._inverse_steps.get(name) != step]
        self._inverse_steps = steps
        if changed:
            self._inverse_updates += len(changed) / len(steps)


def condition_numbers(states: Sequence[LayerState], damping: float) -> dict[Labels, float]:
    """Median and maximum of (λmax + √γ) / (λmin + √γ) over the layers that this rank has decomposed.

    Layers without eigenvalues are left out, since each would cost a decomposition. Factored damping adds
    √γ to each factor, where γ is `damping`.
    """
    found: dict[Labels, float] = {}
    shift = damping**0.5
    for factor in ("A", "G"):
        conditions = []
        for state in states:
            values = state.decomposition.get(f"{factor}_values")
            if values is not None:
                low, high = (float(value) for value in values.aminmax())
                conditions.append((high + shift) / max(low + shift, 1e-30))
        if conditions:
            found[factor, "median"] = statistics.median(conditions)
            found[factor, "max"] = max(conditions)
    return found


def _inverse_steps(kfac: KFAC | None) -> dict[str, int]:
    """Layer name → step of its decomposition."""
    if kfac is None:
        return {}
    return {x.name: state.inverse_step for x, state in zip(kfac.layers, kfac.states, strict=True)}


def _data_counts(trainer: RankTrainer) -> dict[str, float]:
    dataset = trainer.datasets.train
    return dataset.counts if isinstance(dataset, SampleStream) else {}
