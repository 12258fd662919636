"""Layers packed onto ranks, and the search for the packing that moves the least.

`Packing` holds whole-number loads; `settle` takes a balanced packing and looks, without ever raising
its makespan, for one that leaves more decompositions where they are. Everything is deterministic: no
clocks, no hashing order, so that all ranks come to the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_EXACT_LAYERS = 10
_EXACT_PLACES = 40
_EXACT_NODES = 20_000
_SWAP_LAYERS = 80

Place = tuple[int, int, int]
"""(column, rank of A, rank of G)."""


class Packing:
    """Which rank has which layer's factors, with the loads that follow."""

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
        # Ranks row by row, so rank r is entry [r // P, r % P]; places of the last row that do not
        # exist are infinitely loaded.
        num_columns = len(columns)
        rows = len(columns[0])
        self.loads = np.zeros((rows, num_columns), dtype=np.int64)
        for column, ranks in enumerate(columns):
            self.loads[len(ranks) :, column] = np.iinfo(np.int64).max // 4
        self.column_loads = np.zeros(num_columns, dtype=np.int64)

    def copy_empty(self) -> Packing:
        """The same problem with nothing placed."""
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
        """Put layer `index` at `place`."""
        self.placed[index] = place
        self._change(index, place, 1)

    def remove(self, index: int) -> Place:
        """Take layer `index` away; returns where it was."""
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
        # A column of one rank (its second place does not exist) takes both factors there.
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

    def places(self, index: int) -> list[Place]:
        """Every place that layer `index` may have."""
        found: list[Place] = []
        for column, ranks in enumerate(self.columns):
            if self.colocate or len(ranks) == 1:
                found += [(column, rank, rank) for rank in ranks]
            else:
                found += [(column, a, g) for a in ranks for g in ranks if a != g]
        return found

    def fits(self, index: int, place: Place, limit: int) -> bool:
        """Whether the loads stay within `limit` with layer `index` added at `place`."""
        _, a_rank, g_rank = place
        a, g = self.a_units[index], self.g_units[index]
        if a_rank == g_rank:
            return self.load(a_rank) + a + g <= limit
        return self.load(a_rank) + a <= limit and self.load(g_rank) + g <= limit

    def allows(self, place: Place) -> bool:
        """Whether a place obeys the rule for the two factors."""
        column, a_rank, g_rank = place
        return (a_rank == g_rank) == (self.colocate or len(self.columns[column]) == 1)


def settle(
    balanced: Packing,
    order: Sequence[int],
    moves: np.ndarray,
    stay: Sequence[Place | None],
) -> Packing:
    """The packing with no larger makespan than `balanced` that moves the fewest elements found.

    Args:
        balanced: a complete packing; its makespan is the limit.
        order: layers by decreasing cost.
        moves: elements that move if layer i goes to column c [layers, columns].
        stay: where each layer's factors are now, where that place still exists.
    """
    if not order:
        return balanced
    # Each cost was rounded by half a unit at most (2e-10 of the largest), so makespans that differ by
    # less than this are equal.
    limit = balanced.makespan + 2 * len(order)
    sticky = _sticky(balanced, order, moves, stay, limit)
    found = [balanced] if sticky is None else [sticky, balanced]
    for packing in found:
        _improve(packing, order, moves, limit)
    best = min(found, key=lambda packing: _moved(packing, moves))
    if len(order) <= _EXACT_LAYERS and len(best.places(0)) <= _EXACT_PLACES:
        best = _Exact(best, order, moves, stay, limit).run()
    return best


def _moved(packing: Packing, moves: np.ndarray) -> int:
    return sum(int(moves[index, place[0]]) for index, place in enumerate(packing.placed))


def _sticky(
    balanced: Packing,
    order: Sequence[int],
    moves: np.ndarray,
    stay: Sequence[Place | None],
    limit: int,
) -> Packing | None:
    """Leave layers where they are as far as the limit allows, then place the rest; may fail."""
    packing = balanced.copy_empty()
    rest = []
    for index in order:
        place = stay[index]
        cheapest = int(moves[index].argmin())
        if (
            place is not None
            and packing.allows(place)
            and moves[index, place[0]] == moves[index, cheapest]
            and packing.fits(index, place, limit)
        ):
            packing.add(index, place)
            continue
        place = packing.best_place(index, cheapest)
        if packing.fits(index, place, limit):
            packing.add(index, place)
        else:
            rest.append(index)
    for index in rest:
        packing.place_least_loaded(index)
    return packing if packing.makespan <= limit else None


def _improve(
    packing: Packing,
    order: Sequence[int],
    moves: np.ndarray,
    limit: int,
) -> None:
    """Single moves, and swaps of two layers where there are few, that lower what moves."""
    cheapest = moves.argmin(axis=1)
    for _ in range(4):
        changed = False
        for index in order:
            changed |= _try_move(packing, index, int(cheapest[index]), moves, limit)
        if len(order) <= _SWAP_LAYERS:
            for position, first in enumerate(order):
                for second in order[position + 1 :]:
                    changed |= _try_swap(packing, first, second, moves, limit)
        if not changed:
            return


def _try_move(packing: Packing, index: int, column: int, moves: np.ndarray, limit: int) -> bool:
    current = packing.placed[index]
    if moves[index, column] >= moves[index, current[0]]:
        return False
    packing.remove(index)
    place = packing.best_place(index, column)
    fits = packing.fits(index, place, limit)
    packing.add(index, place if fits else current)
    return fits


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


class _Exact:
    """Branch and bound over all places, for few layers; stops after a fixed number of nodes."""

    def __init__(
        self,
        start: Packing,
        order: Sequence[int],
        moves: np.ndarray,
        stay: Sequence[Place | None],
        limit: int,
    ) -> None:
        self.best = start
        self.best_moved = _moved(start, moves)
        self.order = order
        self.moves = moves
        self.limit = limit
        self.nodes = 0
        self.work = start.copy_empty()
        self.places = {
            index: sorted(
                self.work.places(index),
                key=lambda place, index=index: (  # type: ignore[misc]
                    int(moves[index, place[0]]),
                    place != stay[index],
                    place,
                ),
            )
            for index in order
        }
        tails = [0]
        for index in reversed(order):
            tails.append(tails[-1] + int(moves[index].min()))
        self.least_after = tails[::-1]

    def run(self) -> Packing:
        self._visit(0, 0)
        return self.best

    def _visit(self, depth: int, moved: int) -> None:
        if moved + self.least_after[depth] >= self.best_moved or self.nodes >= _EXACT_NODES:
            return
        self.nodes += 1
        if depth == len(self.order):
            found = self.work.copy_empty()
            for index, place in enumerate(self.work.placed):
                found.add(index, place)
            self.best, self.best_moved = found, moved
            return
        index = self.order[depth]
        for place in self.places[index]:
            if self.work.fits(index, place, self.limit):
                self.work.add(index, place)
                self._visit(depth + 1, moved + int(self.moves[index, place[0]]))
                self.work.remove(index)
