"""Few cases instead of a whole product of options, chosen so that no pair of values is left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

Case = TypeVar("Case")


def pairwise(
    product: Sequence[Case],
    values: Callable[[Case], Mapping[str, object]],
    *,
    apart: Collection[tuple[str, str]] = (),
) -> list[Case]:
    """A part of `product` in which every pair of values occurs that occurs in the whole (greedy).

    Args:
        product: All possible cases.
        values: The options of a case by name.
        apart: Pairs of options (names in sorted order) whose values need not meet.
    """

    def pairs(case: Case) -> set[tuple[tuple[str, str], ...]]:
        named = [(name, str(value)) for name, value in sorted(values(case).items())]
        found = itertools.combinations(named, 2)
        return {pair for pair in found if (pair[0][0], pair[1][0]) not in apart}

    known = [pairs(case) for case in product]
    missing = set().union(*known)
    chosen = []
    while missing:
        best = max(range(len(product)), key=lambda index: len(known[index] & missing))
        chosen.append(product[best])
        missing -= known[best]
    return chosen
