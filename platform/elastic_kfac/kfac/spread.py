"""When each layer's statistics and decomposition are due, so that no step does much more than another.

Within `factor_update_steps` F and `inverse_update_steps` I (a multiple of F), every layer has an offset:

    statistics      offset, offset + F, offset + 2F, ...
    decomposition   once in I steps: after one of these; of a large layer some steps later

As a layer's factors are the same from its statistics to its decomposition, a large one can be computed
on another thread in between (ahead.py), with the result it has in its own step. The offsets
depend on shapes and on the rows of the first global batch: they are the same on every rank, at every
world size, and, with those rows in the state, after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from elastic_kfac.curvature.layer import Layer

BUNDLE = 1 << 25
"""Layers whose statistics take fewer multiplications share a step: about 1 ms."""
BUNDLE_PER_LAYER = 1 << 20
"""The same per layer of the model: where some statistics are due, calls of all layers are followed."""
MOST_DELAYED = 10
"""A decomposition waits for at most this part of the interval: older curvature costs steps."""
AHEAD_FROM = 1 << 21
"""Cubed widths from which a decomposition is worth another thread: about 1 ms."""


@dataclass(frozen=True)
class Spread:
    """Steps by layer, modulo the intervals."""

    statistics: tuple[int, ...]
    """Offsets in the factor interval."""
    decompositions: tuple[int, ...]
    """Offsets in the inverse interval."""
    large: tuple[int, ...]
    """Layers whose decomposition is due `delay` steps after their statistics, so that another thread has
    time for it; the others' is due at once."""
    delay: int


def spread(
    layers: Sequence[Layer],
    factor_steps: int,
    inverse_steps: int,
    *,
    rows: Mapping[str, int],
    statistics: bool = True,
) -> Spread:
    """Offsets that balance the work over the steps.

    Args:
        layers: In registration order.
        factor_steps: F.
        inverse_steps: I.
        rows: Samples times positions of a global batch, by layer name.
        statistics: Whether statistics are spread, too.
    """
    shapes = [[*layer.factor_shapes.values()] for layer in layers]
    costs = [
        sum(map(prod, each)) * rows.get(layer.name, 1)
        for layer, each in zip(layers, shapes, strict=True)
    ]
    work = [sum(prod(shape) * shape[-1] for shape in each if len(shape) > 1) for each in shapes]
    offsets = _bundled(costs, factor_steps) if statistics else [0] * len(layers)
    # Intervals that are no multiples of each other have no steps between statistics in common.
    period, starts = factor_steps, offsets
    if inverse_steps % factor_steps:
        period, starts = 1, [0] * len(layers)
    # Step 0 decomposes everything, with nothing newer until the next statistics.
    first = [int(not start and period < inverse_steps) for start in starts]
    cycles = inverse_steps // period
    delay = max(1, min(period - 1, inverse_steps // MOST_DELAYED)) if period > 1 else 0
    large = {i for i, size in enumerate(work) if size >= AHEAD_FROM and delay}
    load, aside, steps = [0] * inverse_steps, [0] * inverse_steps, [0] * len(layers)
    for i in sorted(range(len(layers)), key=lambda i: (-work[i], i)):
        by_step = aside if i in large else load
        begin = starts[i] + delay * (i in large)
        free = range(begin + first[i] * period, begin + cycles * period, period)
        steps[i] = min((step % inverse_steps for step in free), key=by_step.__getitem__)
        near = range(steps[i] - delay, steps[i] + delay + 1) if i in large else [steps[i]]
        for step in near:  # one thread
            by_step[step % inverse_steps] += max(1, work[i])
    return Spread(tuple(offsets), tuple(steps), tuple(sorted(large)), delay)


def balanced(costs: Sequence[int], slots: int) -> list[int]:
    """A slot for each cost, the largest first into the emptiest; with fewer costs than slots, evenly."""
    used = max(1, min(slots, len(costs)))
    load, chosen = [0] * used, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        slot = min(range(used), key=load.__getitem__)
        load[slot] += costs[i]
        chosen[i] = slot * slots // used
    return chosen


def _bundled(costs: Sequence[int], slots: int) -> list[int]:
    """Slots of layers, of which cheap neighbours stay together."""
    least = max(BUNDLE, BUNDLE_PER_LAYER * len(costs))
    bundles: list[list[int]] = []
    total = least
    for i, cost in enumerate(costs):
        if total >= least:
            bundles.append([])
            total = 0
        bundles[-1].append(i)
        total += cost
    slot = balanced([sum(costs[i] for i in bundle) for bundle in bundles], slots)
    return [at for bundle, at in zip(bundles, slot, strict=True) for _ in bundle]
