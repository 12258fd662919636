"""When statistics and decompositions are refreshed: at fixed intervals, or as they change.

The adaptive rule is SP-NGD's (Osawa et al. 2020), per statistic: an interval grows like the Fibonacci
numbers while the statistic resembles its last two snapshots, and halves when it does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.layer import Layer
from elastic_kfac.kfac.ahead import Ahead
from elastic_kfac.kfac.options import value_at
from elastic_kfac.kfac.spread import Spread, spread

SPREAD_FROM = 50
"""Inverse interval from which all is spread by default. Layers whose curvature is of different ages cost
steps where it is renewed all the time; where it is rare, it helps that the first renewal is earlier."""

SumOverRanks = Callable[[Tensor], None]
Sums = Mapping[str, Tensor]
Key = tuple[str, str]
"""Layer and factor name."""


class Refresh(ABC):
    """A rule. `choose` and `agree` are for those that look at the statistics."""

    keeps_snapshots: ClassVar[bool] = False
    snapshots: dict[Key, tuple[Tensor, ...]]
    """The last two statistics, newest first, of the layers this rank decides about."""

    def __init__(self, layers: Sequence[Layer], options: KfacOptions) -> None:
        self._layers, self.options = layers, options
        self.snapshots = {}
        self.ahead = Ahead(needs_damping=options.method != "eigen" or options.precompute)
        """Decompositions that were begun before their step."""

    @abstractmethod
    def statistics_due(self, step: int) -> list[frozenset[str]]:
        """Factors whose statistics `step` refreshes, by layer."""

    @abstractmethod
    def decompositions_due(self, step: int, refreshed: set[int]) -> Collection[int]:
        """Layers that `step` decomposes again; `refreshed` are those with new factors."""

    def decompositions_ahead(self, step: int) -> Iterable[tuple[int, int]]:
        """Large layers whose factors stay as they are after `step` until they are decomposed, and the
        step that does it."""
        return ()

    def see(self, rows: Mapping[str, int]) -> None:  # noqa: B027 (optional)
        """Takes the rows (samples times positions) that layers have in a global batch."""

    def choose(self, layer: Layer, sums: Sums, normalizers: Mapping[str, float]) -> None:  # noqa: B027 (optional)
        """Chooses when the statistics of a layer are due again, on the rank that decides about it."""

    def agree(self, keys: Sequence[Key], step: int, sum_over_ranks: SumOverRanks) -> None:  # noqa: B027 (optional)
        """Tells all ranks what was chosen for refreshed statistics. Collective."""

    def saved_clocks(self) -> dict[str, dict[str, dict[str, int]]]:
        """Plain numbers, by layer and factor."""
        return {}

    def restore_clocks(self, saved: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:  # noqa: B027 (optional)
        """Continues from `saved_clocks`; empty starts afresh."""


class FixedRefresh(Refresh):
    """Every `factor_update_steps` and `inverse_update_steps` steps, for all layers at once or spread."""

    def __init__(self, layers: Sequence[Layer], options: KfacOptions) -> None:
        super().__init__(layers, options)
        self._all = [frozenset(layer.factor_names) for layer in layers]
        self._none = [frozenset[str]() for _ in layers]
        self._spreads: dict[tuple[int, int], Spread] = {}
        self._rows: dict[str, int] = {}
        """Of each layer's first statistics."""
        self._known: tuple[KfacOptions, int, tuple[Spread | None, int, int]] | None = None
        """The offsets and intervals of a step."""

    def see(self, rows: Mapping[str, int]) -> None:
        if not rows.keys() <= self._rows.keys():
            self._rows = {**rows, **self._rows}
            self._forget()

    def _forget(self) -> None:
        self._spreads.clear()
        self._known = None

    def statistics_due(self, step: int) -> list[frozenset[str]]:
        offsets, factor_steps, _ = self._at(step)
        now = step % factor_steps
        if offsets is None or step == 0:
            return self._none if now else self._all
        if now not in offsets.statistics:
            return self._none
        none = self._none[0]
        due = zip(self._all, offsets.statistics, strict=True)
        return [names if offset == now else none for names, offset in due]

    def decompositions_due(self, step: int, refreshed: set[int]) -> Collection[int]:
        offsets, _, inverse_steps = self._at(step)
        now = step % inverse_steps
        if offsets is None or step == 0:
            return () if now else range(len(self._layers))
        if now not in offsets.decompositions:
            return ()
        return {i for i, offset in enumerate(offsets.decompositions) if offset == now}

    def decompositions_ahead(self, step: int) -> Iterable[tuple[int, int]]:
        offsets, _, inverse_steps = self._at(step)
        if offsets is None:
            return ()
        due = step + offsets.delay
        now = due % inverse_steps
        return [(i, due) for i in offsets.large if offsets.decompositions[i] == now]

    def _at(self, step: int) -> tuple[Spread | None, int, int]:
        """The offsets at a step, None for all layers at once, and both intervals."""
        known = self._known
        if known is None or known[0] is not self.options or known[1] != step:
            known = self._known = self.options, step, self._found(step)
        return known[2]

    def _found(self, step: int) -> tuple[Spread | None, int, int]:
        factor_steps = int(value_at(self.options, "factor_update_steps", step))
        inverse_steps = int(value_at(self.options, "inverse_update_steps", step))
        stagger = self.options.stagger
        if stagger is None:
            long = factor_steps > 1 and inverse_steps >= SPREAD_FROM
            stagger = long and self._layers[0].device.type == "cpu"
        if not stagger:
            return None, factor_steps, inverse_steps
        key = factor_steps, inverse_steps
        if key not in self._spreads:
            # Sampled labels take a backward pass of their own in every step with statistics.
            statistics = self.options.fisher == "empirical"
            self._spreads[key] = spread(self._layers, *key, rows=self._rows, statistics=statistics)
        return self._spreads[key], factor_steps, inverse_steps

    def saved_clocks(self) -> dict[str, dict[str, dict[str, int]]]:
        if not self._spreads:
            return {}
        return {name: {"rows": {"first": rows}} for name, rows in self._rows.items()}

    def restore_clocks(self, saved: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        self._forget()
        self._rows = {
            name: int(numbers["rows"]["first"])
            for name, numbers in saved.items()
            if "rows" in numbers
        }


def next_interval(
    similar_to_last: bool, similar_to_one_before: bool, interval: int, interval_before: int
) -> int:
    """Δ from Δ₋₁ and Δ₋₂ and whether the statistic resembles its last two snapshots."""
    if not similar_to_last:
        return max(1, interval // 2)
    if not similar_to_one_before:
        return interval
    return interval + interval_before


@dataclass(frozen=True)
class RefreshClock:
    """When one statistic is due; the same on every rank."""

    next_step: int = 0
    interval: int = 1
    interval_before: int = 1
    refreshes: int = 0

    def due(self, step: int) -> bool:
        """Whether `step` refreshes the statistic."""
        return step >= self.next_step

    def advanced(self, step: int, interval: int) -> RefreshClock:
        """After a refresh in `step` that chose `interval`."""
        return replace(
            self,
            next_step=step + interval,
            interval=interval,
            interval_before=self.interval,
            refreshes=self.refreshes + 1,
        )

    def choose(self, new: Tensor, snapshots: Sequence[Tensor], threshold: float) -> int:
        """Δ for a refresh that brought `new`; similar is `‖X − Y‖_F < α ‖Y‖_F`."""
        similar = [bool((new - old).norm() < threshold * old.norm()) for old in snapshots]
        if len(similar) < 2:
            # Without a second snapshot the interval neither grows nor starts above 1.
            return 1 if not similar else next_interval(similar[0], False, self.interval, 0)
        return next_interval(similar[0], similar[1], self.interval, self.interval_before)


class AdaptiveRefresh(Refresh):
    """Each statistic when its clock is due; what was refreshed is decomposed."""

    keeps_snapshots = True

    def __init__(self, layers: Sequence[Layer], options: KfacOptions) -> None:
        super().__init__(layers, options)
        self.restore_clocks({})
        self._chosen: dict[Key, int] = {}

    def statistics_due(self, step: int) -> list[frozenset[str]]:
        return [
            frozenset(f for f in layer.factor_names if self.clocks[layer.name, f].due(step))
            for layer in self._layers
        ]

    def decompositions_due(self, step: int, refreshed: set[int]) -> Collection[int]:
        return refreshed

    def choose(self, layer: Layer, sums: Sums, normalizers: Mapping[str, float]) -> None:
        for factor, total in sums.items():
            key, mean = (layer.name, factor), total.div(normalizers[factor])
            known = self.snapshots.get(key, ())
            threshold = self.options.refresh_threshold
            self._chosen[key] = self.clocks[key].choose(mean, known, threshold)
            self.snapshots[key] = (mean, *known[:1])

    def agree(self, keys: Sequence[Key], step: int, sum_over_ranks: SumOverRanks) -> None:
        chosen, self._chosen = self._chosen, {}
        table = torch.tensor(
            [chosen.get(key, 0) for key in keys], dtype=torch.float64, device=self._layers[0].device
        )
        sum_over_ranks(table)
        for key, interval in zip(keys, table.tolist(), strict=True):
            if interval:  # nothing was chosen for a statistic that was not finite: it stays due
                self.clocks[key] = self.clocks[key].advanced(step, int(interval))

    def saved_clocks(self) -> dict[str, dict[str, dict[str, int]]]:
        saved: dict[str, dict[str, dict[str, int]]] = {}
        for (layer, factor), clock in self.clocks.items():
            saved.setdefault(layer, {})[factor] = dict(vars(clock))
        return saved

    def restore_clocks(self, saved: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        self.clocks: dict[Key, RefreshClock] = {}
        for layer in self._layers:
            for factor in layer.factor_names:
                clock = saved.get(layer.name, {}).get(factor, {})
                numbers = {name: int(value) for name, value in clock.items()}
                self.clocks[layer.name, factor] = RefreshClock(**numbers)


def busy_steps(
    layers: Sequence[Layer], options: KfacOptions, rows: Mapping[str, int]
) -> tuple[int, int]:
    """Steps of an interval in which statistics of some layers are due, and decompositions.

    `rows` as in `Refresh.see`. Intervals of the first step; 1 and 1 where the curvature decides.
    """
    if options.refresh != "fixed":
        return 1, 1
    refresh = FixedRefresh(layers, options)
    refresh.see(rows)
    factor_steps = int(value_at(options, "factor_update_steps", 0))
    inverse_steps = int(value_at(options, "inverse_update_steps", 0))
    # Step 0 is another one than those that follow.
    counted = range(inverse_steps, inverse_steps + max(factor_steps, inverse_steps))
    statistics = sum(any(refresh.statistics_due(k)) for k in counted[:factor_steps])
    decompositions = sum(
        bool(refresh.decompositions_due(k, set())) for k in counted[:inverse_steps]
    )
    return max(1, statistics), max(1, decompositions)


def make_refresh(layers: Sequence[Layer], options: KfacOptions) -> Refresh:
    """The rule that `refresh` names."""
    return (AdaptiveRefresh if options.refresh == "adaptive" else FixedRefresh)(layers, options)
