"""The plan during a run: what it is made from, and when it is made anew.

Decompositions are timed while they run. Where they leave the prediction by more than `plan.margin`, the
costs are corrected by the ratio and `kfac.grad_worker_frac: auto` is decided again: a placement changes
who computes what and never what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from elastic_kfac.config import Config
from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.kfac.ahead import Work
from elastic_kfac.kfac.kfac import KFAC
from elastic_kfac.kfac.options import value_at
from elastic_kfac.kfac.shapes import layer_shape, plan_of
from elastic_kfac.placement.costs import CostModel, LayerShape, factor_elements
from elastic_kfac.placement.devices import stored_calibration
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import rank_loads
from elastic_kfac.placement.simulator import Calibration, RankSpeed
from elastic_kfac.placement.tuning import (
    Shares,
    StepCost,
    choose_intervals,
    fit_step_cost,
    tuned_damping,
)

_UPDATES = 10
"""Decompositions of every layer between two reviews."""
_WARM_UP = 2
"""Steps of a world whose time means nothing."""
_KEPT = 16
"""Newest steps of each kind whose time counts."""


class PlanReview:
    """Compares measured with predicted decompositions at every `_UPDATES`-th of them."""

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self._plan: Plan | None = None
        self._begin: tuple[int, Work] | None = None
        """Step and decompositions when this plan's timing began."""

    @classmethod
    def of(cls, config: Config) -> PlanReview | None:
        """None where the plan is fixed between resizes."""
        is_open = config.kfac.enabled and config.kfac.grad_worker_frac == "auto"
        if not is_open or config.plan.margin is None or config.optimizer.name == "sharded_kfac":
            return None
        return cls(config.plan.margin)

    def replan(self, kfac: KFAC, step: int) -> dict[str, Any] | None:
        """The change as fields of an event, where there is one. Collective when a review is due."""
        interval = int(value_at(kfac.options, "inverse_update_steps", kfac.steps))
        communicator, work = kfac.communicator, kfac.refresh.ahead.work
        if self._plan is not kfac.plan:
            self._plan, self._begin = kfac.plan, None
        if kfac.plan.world_size == 1:
            return None
        if self._begin is None:
            # The first decompositions of a process warm up.
            self._begin = (step, deepcopy(work)) if kfac.steps and step % interval == 0 else None
            return None
        if step - self._begin[0] < _UPDATES * interval:
            return None
        # Those that were made, not those that the interval suggests: some are made early.
        before, self._begin = self._begin[1], (step, deepcopy(work))
        known = _known(kfac)
        expected = {(x.name, n): c for x in _shapes(kfac) for n, c in _factor_costs(known.costs, x)}
        predicted = sum(expected[key] * count for key, count in (work.done - before.done).items())
        own = (work.seconds - before.seconds, predicted)
        everybody = communicator.all_gather_object(own, tag="plan/review")
        seconds, predicted = (sum(column) for column in zip(*everybody, strict=True))
        if predicted <= 0 or 1 / (1 + self._margin) <= seconds / predicted <= 1 + self._margin:
            return None
        ratio = seconds / predicted
        costs = CostModel(known.costs.c0 * ratio, known.costs.c1 * ratio, known.costs.p)
        kfac.calibration = replace(known, costs=costs)
        before_plan = kfac.plan
        report = kfac.resize(communicator)
        changes = before_plan.diff(report.plan)
        if not changes:
            return None
        text = (
            f"decompositions took {seconds * 1e3:.3g} ms over all ranks since the last look, "
            f"predicted were {predicted * 1e3:.3g} ms"
        )
        return {
            "reason": f"{text}; {report.plan.reason}",
            "changes": changes,
            "moved_bytes": report.moved_bytes,
            "way": "resize",
        }


class Retuning:
    """`plan.retune`: what steps cost in the present world, and what follows from it for the next one.

    The costs are a part of the state, as ranks are when they are restarted for a resize.
    """

    def __init__(self, config: KfacOptions, batch_size: int) -> None:
        self._given, self._batch_size = config, batch_size
        self._world_size, self._samples, self._steps = 0, 0, 0
        self._seconds: dict[Shares, list[float]] = {}

    @classmethod
    def of(cls, config: Config) -> Retuning | None:
        """None where intervals and damping stay."""
        if not config.plan.retune:
            return None
        return cls(config.kfac, config.train.global_batch_size)

    def saw(self, kfac: KFAC, due: Sequence[frozenset[str]], samples: int, seconds: float) -> None:
        """Takes note of a step, in which statistics of the factors in `due` were taken."""
        if self._world_size != kfac.communicator.world_size:
            self._world_size, self._steps, self._seconds = kfac.communicator.world_size, 0, {}
        self._samples, self._steps = samples, self._steps + 1
        if self._steps <= _WARM_UP:
            return
        shapes = _shapes(kfac)
        sizes = [factor_elements([shape]) for shape in shapes]
        costs = [sum(c for _, c in _factor_costs(_known(kfac).costs, x)) for x in shapes]
        newest = kfac.steps - 1 - kfac.options.overlap_reduction
        made = [state.inverse_step == newest for state in kfac.states]
        parts = [len(d) / len(x.factor_names) for d, x in zip(due, kfac.layers, strict=True)]
        taken = sum(size * part for size, part in zip(sizes, parts, strict=True))
        done = sum(c for c, is_new in zip(costs, made, strict=True) if is_new)
        key = round(taken / (sum(sizes) or 1), 2), round(done / (sum(costs) or 1), 2)
        self._seconds[key] = [*self._seconds.get(key, ()), seconds][-_KEPT:]

    def choose(self, kfac: KFAC, batch_size: int) -> dict[str, Any] | None:
        """Sets intervals and damping for the present ranks, if those before were others; the change as
        fields of an event. Collective."""
        communicator = kfac.communicator
        if self._world_size in (0, communicator.world_size):
            return None
        chosen, details = communicator.broadcast_object(
            self._choice(kfac, batch_size) if communicator.rank == 0 else None,
            0,
            tag="plan/retune",
        )
        if chosen == kfac.tuned:
            return None
        kfac.retune(**chosen)
        if kfac.options.grad_worker_frac == "auto":
            kfac.resize(communicator)
        return {**details, **chosen}

    def _choice(self, kfac: KFAC, batch_size: int) -> tuple[dict[str, float], dict[str, Any]]:
        given, options = self._given, kfac.options
        chosen, details, texts = dict(kfac.tuned), {}, []
        intervals = _intervals(given), _intervals(options)
        measured = fit_step_cost(self._seconds)
        age = 1.0
        if measured is not None and intervals[0] and intervals[1]:
            cost, current = self._in_new_world(measured, kfac, batch_size), intervals[1]
            best = choose_intervals(cost, intervals[0], current)
            chosen |= {"factor_update_steps": best[0], "inverse_update_steps": best[1]}
            age = best[1] / intervals[0][1]
            before, after = cost.step(current), cost.step(best)
            details["predicted_gain"] = 1 - after / before
            texts.append(
                f"statistics every {best[0]} and decompositions every {best[1]} steps take "
                f"{cost.refresh(best) / after:.0%} of a step"
            )
            if best != current:
                texts[-1] += (
                    f" instead of {cost.refresh(current) / before:.0%} (every {current[0]} and "
                    f"{current[1]}): {after * 1e3:.3g} ms a step instead of {before * 1e3:.3g} ms"
                )
        else:
            texts.append("intervals follow their schedule")
        if isinstance(given.damping, float):
            chosen["damping"] = tuned_damping(given.damping, age, batch_size / self._batch_size)
            texts.append(
                f"damping {value_at(options, 'damping', kfac.steps):.3g} → {chosen['damping']:.3g}"
            )
        else:
            texts.append("damping follows its own rule")
        return chosen, {**details, "reason": "; ".join(texts)}

    def _in_new_world(self, cost: StepCost, kfac: KFAC, batch_size: int) -> StepCost:
        """Passes follow a rank's share of the batch, decompositions those of the fullest rank."""
        known, shapes = _known(kfac), _shapes(kfac)
        n = kfac.communicator.world_size
        share = (batch_size / n) / max(1.0, self._samples / self._world_size)
        loads = [
            max(rank_loads(plan, shapes, known.costs, known.decomposition_speeds(plan.world_size)))
            for plan in (
                plan_of(shapes, self._world_size, self._given, calibration=known),
                kfac.plan,
            )
        ]
        ratio = loads[1] / loads[0] if loads[0] else 1.0
        return StepCost(cost.plain * share, cost.statistics * share, cost.decompositions * ratio)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "world_size": self._world_size,
            "samples": self._samples,
            "steps": self._steps,
            "seconds": [[*key, *values] for key, values in self._seconds.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict()`; empty starts afresh."""
        self._world_size = int(state.get("world_size", 0))
        self._samples, self._steps = int(state.get("samples", 0)), int(state.get("steps", 0))
        self._seconds = {(f, d): values for f, d, *values in state.get("seconds", ())}


def move_decompositions(kfac: KFAC, speeds: Sequence[float]) -> None:
    """Gives ranks decompositions by their speeds, 1 for a rank as fast as planned so far. Collective."""
    known = _known(kfac)
    before = known.speeds_of(len(speeds)) or (RankSpeed(),) * len(speeds)
    kfac.calibration = replace(
        known,
        speeds=tuple(
            RankSpeed(old.passes * speed, old.decompositions * speed)
            for old, speed in zip(before, speeds, strict=True)
        ),
    )
    kfac.resize(kfac.communicator)


def _known(kfac: KFAC) -> Calibration:
    """What plans of a preconditioner are made from."""
    return kfac.calibration or stored_calibration(kfac.options.method, kfac.layers[0].device.type)


def _shapes(kfac: KFAC) -> list[LayerShape]:
    return [layer_shape(layer) for layer in kfac.layers]


def _intervals(options: KfacOptions) -> tuple[int, int] | None:
    """Both intervals where they are numbers."""
    factor_steps, inverse_steps = options.factor_update_steps, options.inverse_update_steps
    if isinstance(factor_steps, int) and isinstance(inverse_steps, int):
        return factor_steps, inverse_steps
    return None


def _factor_costs(costs: CostModel, shape: LayerShape) -> list[tuple[str, float]]:
    """Predicted seconds to decompose each factor of a layer, by its name."""
    a, g = costs.a_seconds(shape), costs.g_seconds(shape)
    return [("F", a + g), ("A", a), ("G", g)]
