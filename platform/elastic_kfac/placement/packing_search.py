"""Packing layers onto ranks, and the search for the packing that moves the fewest elements.

`Packing` holds loads in whole units. `settle` takes a balanced packing and searches, without raising
its makespan, for one that leaves more decompositions at their ranks. Both are deterministic (no clock,
no hash order), so all ranks compute the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

_EXACT_LAYERS = 10
_EXACT_PLACES = 40
_EXACT_NODES = 20_000
_SWAP_LAYERS = 80
_SWAP_ROUNDS = 4

Place = tuple[int, int, int]
"""(column, rank of A, rank of G)."""


class Packing:
    """The place of every layer, with the resulting loads in whole units."""

    def __init__(
        self,
        columns: tuple[tuple[int, ...], ...],
        a_units: Sequence[int],
        g_units: Sequence[int],
        *,
        colocate: bool,
    ) -> None:
        self.columns = columns
        self.a_units = a_units
        self.g_units = g_units
        self.colocate = colocate
        self.placed: list[Place] = [(-1, -1, -1)] * len(a_units)
        # Rank r is entry [r // P, r % P]; entries of the last row without a rank have an infinite load.
        num_columns = len(columns)
        rows = len(columns[0])
        self.loads = np.zeros((rows, num_columns), dtype=np.int64)
        for column, ranks in enumerate(columns):
            self.loads[len(ranks) :, column] = np.iinfo(np.int64).max // 4
        self.column_loads = np.zeros(num_columns, dtype=np.int64)

    def copy_empty(self) -> Packing:
        """The same problem without placed layers."""
        return Packing(self.columns, self.a_units, self.g_units, colocate=self.colocate)

    @property
    def makespan(self) -> int:
        """The largest load of a rank."""
        loads = self.loads
        return int(loads[loads < np.iinfo(np.int64).max // 8].max())

    def load(self, rank: int) -> int:
        """Load of one rank."""
        return int(self.loads[divmod(rank, len(self.columns))])

    def add(self, index: int, place: Place) -> None:
        """Places layer `index`."""
        self.placed[index] = place
        self._change(index, place, 1)

    def remove(self, index: int) -> Place:
        """Removes layer `index`; returns its place."""
        place = self.placed[index]
        self._change(index, place, -1)
        self.placed[index] = (-1, -1, -1)
        return place

    def _change(self, index: int, place: Place, sign: int) -> None:
        column, a_rank, g_rank = place
        a, g = self.a_units[index], self.g_units[index]
        self.loads[divmod(a_rank, len(self.columns))] += sign * a
        self.loads[divmod(g_rank, len(self.columns))] += sign * g
        self.column_loads[column] += sign * (a + g)

    def place_least_loaded(self, index: int) -> None:
        """One step of longest-processing-time-first."""
        self.add(index, self._least_loaded(index))

    def _least_loaded(self, index: int) -> Place:
        num_columns = len(self.columns)
        if self.colocate or self.loads.shape[0] == 1:
            flat = self.loads.reshape(-1)
            candidates = np.flatnonzero(flat == flat.min())
            ends = self.column_loads[candidates % num_columns]
            rank = int(candidates[ends == ends.min()][0])
            return rank % num_columns, rank, rank
        larger = max(self.a_units[index], self.g_units[index])
        smaller = min(self.a_units[index], self.g_units[index])
        lowest = np.partition(self.loads, 1, axis=0)[:2]
        # A column of one rank takes both factors.
        alone = np.array([len(ranks) == 1 for ranks in self.columns])
        ends = np.maximum(lowest[0] + larger, lowest[1] + smaller)
        ends = np.where(alone, lowest[0] + larger + smaller, ends)
        candidates = np.flatnonzero(ends == ends.min())
        totals = self.column_loads[candidates]
        return self.best_place(index, int(candidates[totals == totals.min()][0]))

    def best_place(self, index: int, column: int) -> Place:
        """The least loaded rank (or two) of a column for layer `index`."""
        ranks = self.columns[column]
        loads = self.loads[: len(ranks), column]
        least = int(loads.argmin())
        first = ranks[least]
        if self.colocate or len(ranks) == 1:
            return column, first, first
        above = int(loads[:least].argmin()) if least else -1
        below = least + 1 + int(loads[least + 1 :].argmin()) if least + 1 < len(ranks) else -1
        if above < 0 or (below >= 0 and loads[below] < loads[above]):
            second = ranks[below]
        else:
            second = ranks[above]
        if self.a_units[index] >= self.g_units[index]:
            return column, first, second
        return column, second, first

    def places(self) -> list[Place]:
        """All places of a layer."""
        found: list[Place] = []
        for column, ranks in enumerate(self.columns):
            if self.colocate or len(ranks) == 1:
                found += [(column, rank, rank) for rank in ranks]
            else:
                found += [(column, a, g) for a in ranks for g in ranks if a != g]
        return found

    def fits(self, index: int, place: Place, limit: int) -> bool:
        """Whether the loads stay within `limit` with layer `index` at `place`."""
        _, a_rank, g_rank = place
        a, g = self.a_units[index], self.g_units[index]
        if a_rank == g_rank:
            return self.load(a_rank) + a + g <= limit
        return self.load(a_rank) + a <= limit and self.load(g_rank) + g <= limit

    def allows(self, place: Place) -> bool:
        """Whether a place follows `colocate`."""
        column, a_rank, g_rank = place
        return (a_rank == g_rank) == (self.colocate or len(self.columns[column]) == 1)


def settle(
    balanced: Packing,
    order: Sequence[int],
    moves: np.ndarray,
    stay: Sequence[Place | None],
) -> list[Place]:
    """The places with no larger makespan than `balanced` that move the fewest elements found.

    Exact for few layers and places (up to a number of search nodes). Otherwise layers stay where they
    are as far as the makespan allows; where that fails, pairs of layers of `balanced` are swapped.

    Args:
        balanced: A complete packing; its makespan is the limit.
        order: Layers by decreasing cost.
        moves: Elements that move if layer i goes to column c [layers, columns].
        stay: The present place of each layer, where that place still exists.
    """
    if not order:
        return []
    # Each cost was rounded by at most half a unit (2e-10 of the largest), so makespans that differ by
    # less than this are equal.
    limit = balanced.makespan + 2 * len(order)
    best = _sticky(balanced, order, moves, stay, limit)
    if best is None or _moved(best, moves) > _moved(balanced, moves):
        best = balanced
        if len(order) <= _SWAP_LAYERS:
            _swap(best, order, moves, limit)
    if len(order) <= _EXACT_LAYERS and len(best.places()) <= _EXACT_PLACES:
        return _fewest_moves(best, order, moves, stay, limit)
    return best.placed


def _moved(packing: Packing, moves: np.ndarray) -> int:
    return sum(int(moves[index, place[0]]) for index, place in enumerate(packing.placed))


def _sticky(
    balanced: Packing,
    order: Sequence[int],
    moves: np.ndarray,
    stay: Sequence[Place | None],
    limit: int,
) -> Packing | None:
    """Keeps layers at their places as far as the limit allows, then places the rest; may fail."""
    packing = balanced.copy_empty()
    rest = []
    for index in order:
        cheapest = int(moves[index].argmin())
        place = stay[index]
        if place is not None and (
            not packing.allows(place)
            or moves[index, place[0]] > moves[index, cheapest]
            or not packing.fits(index, place, limit)
        ):
            place = None
        place = place or packing.best_place(index, cheapest)
        if packing.fits(index, place, limit):
            packing.add(index, place)
        else:
            rest.append(index)
    for index in rest:
        packing.place_least_loaded(index)
    return packing if packing.makespan <= limit else None


def _swap(packing: Packing, order: Sequence[int], moves: np.ndarray, limit: int) -> None:
    """Swaps the columns of two layers wherever that lowers the elements that move."""
    for _ in range(_SWAP_ROUNDS):
        if not sum(_try_swap(packing, *pair, moves, limit) for pair in combinations(order, 2)):
            return


def _try_swap(packing: Packing, first: int, second: int, moves: np.ndarray, limit: int) -> bool:
    at_first, at_second = packing.placed[first], packing.placed[second]
    before = moves[first, at_first[0]] + moves[second, at_second[0]]
    if moves[first, at_second[0]] + moves[second, at_first[0]] >= before:
        return False
    packing.remove(first)
    packing.remove(second)
    place = packing.best_place(first, at_second[0])
    if packing.fits(first, place, limit):
        packing.add(first, place)
        other = packing.best_place(second, at_first[0])
        if packing.fits(second, other, limit):
            packing.add(second, other)
            return True
        packing.remove(first)
    packing.add(first, at_first)
    packing.add(second, at_second)
    return False


def _fewest_moves(
    start: Packing,
    order: Sequence[int],
    moves: np.ndarray,
    stay: Sequence[Place | None],
    limit: int,
) -> list[Place]:
    """Branch and bound over all places from `start`; stops after a fixed number of nodes."""
    work, best, fewest, nodes = start.copy_empty(), start.placed, _moved(start, moves), 0
    choices = {
        index: sorted(work.places(), key=lambda p: (moves[index, p[0]], p != stay[index], p))
        for index in order
    }
    least_after = [sum(int(moves[i].min()) for i in order[depth:]) for depth in range(len(order))]

    def visit(depth: int, moved: int) -> None:
        nonlocal best, fewest, nodes
        if depth == len(order):
            if moved < fewest:
                best, fewest = list(work.placed), moved
            return
        if moved + least_after[depth] >= fewest or nodes >= _EXACT_NODES:
            return
        nodes += 1
        index = order[depth]
        for place in choices[index]:
            if work.fits(index, place, limit):
                work.add(index, place)
                visit(depth + 1, moved + int(moves[index, place[0]]))
                work.remove(index)

    visit(0, 0)
    return best
