"""Packing layers onto ranks, and the search for the packing that moves the fewest elements.

`Packing` holds loads in whole units. `settle` takes a balanced packing and searches, without raising
its makespan, for one that leaves more decompositions at their ranks. Both are deterministic (no clock,
no hash order), so all ranks compute the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

_EXACT_LAYERS = 10
_EXACT_PLACES = 40
_EXACT_NODES = 20_000
_SWAP_LAYERS = 80
_SWAP_ROUNDS = 4

Place = tuple[int, int, int]
"""(column, rank of A, rank of G)."""
Moves = Sequence[Sequence[int]]
"""Elements that move if layer i goes to column c, [layers][columns]."""


class Packing:
    """The place of every layer, with the resulting loads in whole units."""

    def __init__(
        self,
        columns: tuple[tuple[int, ...], ...],
        a_units: Sequence[int],
        g_units: Sequence[int],
        *,
        colocate: bool,
        slowness: Sequence[int] = (),
    ) -> None:
        """`slowness`: time per unit, by rank; empty where all ranks are equally fast."""
        self.columns = columns
        self.slowness = slowness
        self.a_units = a_units
        self.g_units = g_units
        self.colocate = colocate
        self.placed: list[Place] = [(-1, -1, -1)] * len(a_units)
        world_size = sum(map(len, columns))
        self.loads = [0] * world_size
        self.slow = list(slowness) or [1] * world_size
        self.column_loads = [0] * len(columns)

    def copy_empty(self) -> Packing:
        """The same problem without placed layers."""
        return Packing(
            self.columns,
            self.a_units,
            self.g_units,
            colocate=self.colocate,
            slowness=self.slowness,
        )

    @property
    def makespan(self) -> int:
        """The largest load of a rank."""
        return max(self.loads)

    def load(self, rank: int) -> int:
        """Load of one rank."""
        return self.loads[rank]

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
        for rank, units in ((a_rank, a), (g_rank, g)):
            self.loads[rank] += sign * units * self.slow[rank]
        self.column_loads[column] += sign * (a + g)

    def place_least_loaded(self, index: int) -> None:
        """One step of longest-processing-time-first."""
        self.add(index, self._least_loaded(index))

    def _least_loaded(self, index: int) -> Place:
        num_columns = len(self.columns)
        a, g = self.a_units[index], self.g_units[index]
        if self.colocate or len(self.columns[0]) == 1:
            ends = self._ends(a + g) if self.slowness else self.loads
            least = min(ends)
            first = [rank for rank, end in enumerate(ends) if end == least]
            rank = min(first, key=lambda r: self.column_loads[r % num_columns])
            return rank % num_columns, rank, rank
        # The end of the layer in each column; a column of one rank takes both factors.
        ends = []
        for column, ranks in enumerate(self.columns):
            _, a_rank, g_rank = self.best_place(index, column)
            if len(ranks) == 1:
                ends.append(self.loads[a_rank] + (a + g) * self.slow[a_rank])
            else:
                a_end = self.loads[a_rank] + a * self.slow[a_rank]
                ends.append(max(a_end, self.loads[g_rank] + g * self.slow[g_rank]))
        least = min(ends)
        columns = [column for column, end in enumerate(ends) if end == least]
        return self.best_place(index, min(columns, key=self.column_loads.__getitem__))

    def _ends(self, units: int) -> list[int]:
        """When each rank would be done with so much more."""
        return [load + units * slow for load, slow in zip(self.loads, self.slow, strict=True)]

    def best_place(self, index: int, column: int) -> Place:
        """The rank (or two) of a column where layer `index` ends first."""
        ranks = self.columns[column]
        a, g = self.a_units[index], self.g_units[index]
        if self.colocate or len(ranks) == 1:
            rank = min(ranks, key=lambda r: self.loads[r] + (a + g) * self.slow[r])
            return column, rank, rank
        large, small = max(a, g), min(a, g)
        larger = min(ranks, key=lambda r: self.loads[r] + large * self.slow[r])
        rest = [rank for rank in ranks if rank != larger]
        smaller = min(rest, key=lambda r: self.loads[r] + small * self.slow[r])
        return (column, larger, smaller) if a >= g else (column, smaller, larger)

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
        a, g = (
            units[index] * self.slow[rank]
            for units, rank in ((self.a_units, a_rank), (self.g_units, g_rank))
        )
        if a_rank == g_rank:
            return self.load(a_rank) + a + g <= limit
        return self.load(a_rank) + a <= limit and self.load(g_rank) + g <= limit

    def allows(self, place: Place) -> bool:
        """Whether a place follows `colocate`."""
        column, a_rank, g_rank = place
        return (a_rank == g_rank) == (self.colocate or len(self.columns[column]) == 1)


def level(packing: Packing, order: Sequence[int]) -> None:
    """Lowers the makespan of a complete packing over ranks of different speeds, by local search.

    Longest-processing-time-first is within 4/3 of the optimum where ranks are equally fast, and not
    otherwise. Layers of the fullest rank move, or change places with another one, while that helps.
    """
    if len(order) > _SWAP_LAYERS:
        return
    for _ in range(_SWAP_ROUNDS * len(order)):
        before = packing.makespan
        fullest = packing.loads.index(before)
        stuck = [i for i in order if fullest in packing.placed[i][1:]]
        others = [None, *(i for i in order if i not in stuck)]
        if not any(_relieves(packing, i, j, before) for i in stuck for j in others):
            return


def _relieves(packing: Packing, index: int, other: int | None, before: int) -> bool:
    """Places a layer (and another) anew if the makespan then is lower than `before`."""
    pair = [index] if other is None else [index, other]
    places = [packing.remove(i) for i in pair]
    for i in reversed(pair):  # the layer of the fullest rank last: it has to go elsewhere
        packing.place_least_loaded(i)
    if packing.makespan < before:
        return True
    for i in pair:
        packing.remove(i)
    for i, place in zip(pair, places, strict=True):
        packing.add(i, place)
    return _exchanged(packing, pair, places, before) if other is not None else False


def _exchanged(packing: Packing, pair: Sequence[int], places: Sequence[Place], before: int) -> bool:
    for i in pair:
        packing.remove(i)
    for i, place in zip(pair, reversed(places), strict=True):
        packing.add(i, place)
    if packing.makespan < before:
        return True
    for i in pair:
        packing.remove(i)
    for i, place in zip(pair, places, strict=True):
        packing.add(i, place)
    return False


def settle(
    balanced: Packing,
    order: Sequence[int],
    moves: Moves,
    stay: Sequence[Place | None],
) -> list[Place]:
    """The places with no larger makespan than `balanced` that move the fewest elements found.

    Exact for few layers and places (up to a number of search nodes). Otherwise layers stay where they
    are as far as the makespan allows; where that fails, pairs of layers of `balanced` are swapped.

    Args:
        balanced: A complete packing; its makespan is the limit.
        order: Layers by decreasing cost.
        moves: Elements that move if layer i goes to column c.
        stay: The present place of each layer, where that place still exists.
    """
    if not order:
        return []
    # Each cost was rounded by at most half a unit (2e-10 of the largest), so makespans that differ by
    # less than this are equal.
    limit = balanced.makespan + 2 * len(order) * max(balanced.slow)
    best = _sticky(balanced, order, moves, stay, limit)
    if best is None or _moved(best, moves) > _moved(balanced, moves):
        best = balanced
        if len(order) <= _SWAP_LAYERS:
            _swap(best, order, moves, limit)
    if len(order) <= _EXACT_LAYERS and len(best.places()) <= _EXACT_PLACES:
        return _fewest_moves(best, order, moves, stay, limit)
    return best.placed


def _moved(packing: Packing, moves: Moves) -> int:
    return sum(moves[index][place[0]] for index, place in enumerate(packing.placed))


def _sticky(
    balanced: Packing,
    order: Sequence[int],
    moves: Moves,
    stay: Sequence[Place | None],
    limit: int,
) -> Packing | None:
    """Keeps layers at their places as far as the limit allows, then places the rest; may fail."""
    packing = balanced.copy_empty()
    rest = []
    for index in order:
        cheapest = moves[index].index(min(moves[index]))
        place = stay[index]
        if place is not None and (
            not packing.allows(place)
            or moves[index][place[0]] > moves[index][cheapest]
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


def _swap(packing: Packing, order: Sequence[int], moves: Moves, limit: int) -> None:
    """Swaps the columns of two layers wherever that lowers the elements that move."""
    for _ in range(_SWAP_ROUNDS):
        if not sum(_try_swap(packing, *pair, moves, limit) for pair in combinations(order, 2)):
            return


def _try_swap(packing: Packing, first: int, second: int, moves: Moves, limit: int) -> bool:
    at_first, at_second = packing.placed[first], packing.placed[second]
    before = moves[first][at_first[0]] + moves[second][at_second[0]]
    if moves[first][at_second[0]] + moves[second][at_first[0]] >= before:
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
    moves: Moves,
    stay: Sequence[Place | None],
    limit: int,
) -> list[Place]:
    """Branch and bound over all places from `start`; stops after a fixed number of nodes."""
    work, best, fewest, nodes = start.copy_empty(), start.placed, _moved(start, moves), 0
    choices = {
        index: sorted(work.places(), key=lambda p: (moves[index][p[0]], p != stay[index], p))
        for index in order
    }
    least_after = [sum(min(moves[i]) for i in order[depth:]) for depth in range(len(order))]

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
                visit(depth + 1, moved + moves[index][place[0]])
                work.remove(index)

    visit(0, 0)
    return best
