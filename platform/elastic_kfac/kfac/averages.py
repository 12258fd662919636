"""The running averages of statistics and the decompositions made of them, as steps move them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.layer import Layer, LayerState
from elastic_kfac.errors import NumericalError
from elastic_kfac.kfac.distribution.strategy import Distribution
from elastic_kfac.kfac.options import value_at
from elastic_kfac.kfac.refresh import Refresh
from elastic_kfac.kfac.statistics import Statistics, Verdict

Damping = Callable[[int], float]
"""γ, without weight decay in it, that decompositions of a step use."""


class Averages:
    """What this rank holds of each layer.

    Args:
        distribution: Who decomposes, and its layers.
        refresh: When statistics and decompositions are renewed.
        options: Of the preconditioner.
        counters: Events are counted here.
    """

    def __init__(
        self,
        distribution: Distribution,
        refresh: Refresh,
        options: KfacOptions,
        counters: Counter[str],
    ) -> None:
        self.distribution, self.refresh, self.options = distribution, refresh, options
        self.counters = counters
        self.layers: Sequence[Layer] = distribution.layers
        self.states = [LayerState() for _ in self.layers]
        self._continuing = [i for i, layer in enumerate(self.layers) if layer.continues]
        self._verdict: Verdict | None = None

    # -- averages -------------------------------------------------------------------------------

    def update(
        self, statistics: Statistics, seen: set[int], due: Sequence[frozenset[str]], step: int
    ) -> set[int]:
        """Moves the running averages of layers that passes have gone through. Collective.

        Args:
            statistics: Of all ranks.
            seen: Layers with statistics.
            due: Factors to refresh, by layer.
            step: Which one it is.

        Returns:
            The layers whose statistics came and, as far as the host knows, were finite.
        """
        for i in statistics.faulty:
            self.states[i] = LayerState()
        here = [i for i in sorted(seen) if statistics.sums[i] and due[i]]
        self.settle()
        is_first = not all(self.states[i].factors for i in here)
        at_once = is_first or self.options.refresh == "adaptive"
        self._verdict = Verdict(here, statistics.finite(here), at_once=at_once)
        # Until the host knows, the device keeps the old averages where the new statistics are not finite.
        flags = self._verdict.flags
        refreshed = set(here) if flags else self.settle()
        for i in sorted(refreshed):
            self._average(i, statistics, due[i], step, flags.get(i))
        keys = [(self.layers[i].name, name) for i in sorted(seen) for name in sorted(due[i])]
        self.refresh.agree(keys, step, self._sum_over_ranks)
        return refreshed

    def _average(
        self, i: int, statistics: Statistics, due: frozenset[str], step: int, flag: Tensor | None
    ) -> None:
        """Of one layer; where there is a `flag`, only if it is true."""
        layer, divisors = self.layers[i], statistics.normalizers(self.layers[i], i)
        sums = {name: statistics.sums[i][name] for name in layer.factor_names if name in due}
        if self.distribution.decider(i) == self.distribution.rank:
            self.refresh.choose(layer, sums, divisors)
        decay = value_at(self.options, "factor_decay", step)
        consume = not statistics.are_given
        state = layer.average(self.states[i], sums, divisors, decay, consume=consume)
        state = layer.corrected(state, statistics.counts[i][0], decay)
        self.states[i] = state if flag is None else state.where(flag, self.states[i])

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        self.distribution.communicator.all_reduce(tensor, tag="kfac/intervals").wait()

    def settle(self) -> set[int]:
        """Waits for what the device still has to tell about the last update, and counts the statistics
        that were not finite; the layers whose were."""
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return set()
        good = verdict.finite()
        bad = set(verdict.indices) - good
        self.counters["discarded_statistics"] += len(bad)
        for i in bad & verdict.flags.keys():  # their update was counted already
            updates = self.states[i].factor_updates - 1
            self.states[i] = replace(self.states[i], factor_updates=updates)
        return good

    def forget_update(self) -> None:
        """Nothing is left to be told: other states are put in the place of these."""
        self._verdict = None

    # -- decompositions -------------------------------------------------------------------------

    def decompose(
        self, refreshed: set[int], step: int, damping: Damping, before_exchange: Callable[[], None]
    ) -> list[int]:
        """New eigendecompositions or inverses where they are due; a failed one keeps the last.

        Collective.

        Args:
            refreshed: Layers with new factors.
            step: Which one it is.
            damping: At a step.
            before_exchange: Called where ranks are going to exchange decompositions.

        Returns:
            The layers that were decomposed, here or on another rank.

        Raises:
            NumericalError: If the first decomposition of a layer fails in every way.
        """
        last = {i: self.states[i].decomposition for i in self._continuing}
        due = self._due(refreshed, step)
        if due:
            value = damping(step)
            for i in due:
                self._decompose(i, step, value)
            before_exchange()
        self.distribution.share(self.states, due, last)
        for i, later in self.refresh.decompositions_ahead(step):
            state, names = self.states[i], self.distribution.decomposes(i)
            if state.inverse_step >= 0 and names:
                self.refresh.ahead.begin(self.layers[i], state, names, damping(later))
        return due

    def _due(self, refreshed: set[int], step: int) -> list[int]:
        """Layers to decompose, all of whose factors are there."""
        stale = self.refresh.decompositions_due(step, refreshed)
        return [
            i
            for i, (layer, state) in enumerate(zip(self.layers, self.states, strict=True))
            if (state.inverse_step < 0 or i in stale)
            and len(state.factors) == len(layer.factor_names)
        ]

    def _decompose(self, i: int, step: int, damping: float) -> None:
        state, names = self.states[i], self.distribution.decomposes(i)
        parts: Mapping[str, Tensor] = {}
        try:
            if names:
                parts = self.refresh.ahead.decompose(self.layers[i], state, names, damping)
        except NumericalError:
            self.counters["inverse_failures"] += 1
            if state.inverse_step < 0:
                raise
        # Ranks that do not hold the decomposition track its age, too.
        self.states[i] = state.decomposed(parts, step)
