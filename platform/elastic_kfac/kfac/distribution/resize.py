"""Moving K-FAC's state to another set of ranks: survivors keep what they hold, the rest is sent once.

Every rank reports what it holds and how old it is. The plan with the least makespan that moves the fewest
bytes follows; then each rank that lacks a part of the state receives it from one rank that has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.kfac.distribution.strategy import Distribution, Item
from elastic_kfac.placement.plan import Plan


@dataclass(frozen=True)
class ResizeReport:
    """What a resize did."""

    previous: Plan
    """The plan of the ranks that went furthest."""
    plan: Plan
    moved_bytes: int
    """Received over all ranks together."""
    lost: tuple[str, ...]
    """Layers whose factors went with the ranks that held them; they start afresh."""


@dataclass(frozen=True)
class Held:
    """A part of the state on this rank."""

    age: int
    """Larger is newer; -1 is a part that no rank holds."""
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Moved:
    """The outcome on this rank."""

    report: ResizeReport
    facts: Mapping[str, Any]
    """Of the rank that went furthest."""
    ages: Mapping[Item, int]
    """Of every part of the state that some rank holds."""
    tensors: Mapping[Item, Mapping[str, Tensor]]
    """The parts that this rank keeps."""


def move(
    distribution: Distribution,
    communicator: Communicator,
    held: Mapping[Item, Held],
    facts: Mapping[str, Any],
) -> Moved:
    """Joins other ranks under a plan of theirs. Collective over them.

    Args:
        distribution: Joins `communicator`.
        communicator: The new ranks.
        held: What this rank has.
        facts: Plain values; among them `steps`, how far this rank went, and `used`, names of layers,
            and `tuned`, options that all go on with.
    """
    report = {
        "facts": dict(facts),
        "plan": distribution.plan.to_dict(),
        "rank": distribution.rank,
        "held": {
            item: (part.age, [(n, tuple(t.shape), t.dtype) for n, t in part.tensors.items()])
            for item, part in held.items()
            if part.age >= 0
        },
    }
    everybody: Sequence[dict[str, Any]] = communicator.all_gather_object(report, tag="kfac/resize")
    newest = max(everybody, key=lambda other: other["facts"]["steps"])
    # What moves is counted from where things are. A newcomer has a plan of its own making.
    previous_ranks = [
        other["rank"] if other["plan"] == newest["plan"] and other["held"] else None
        for other in everybody
    ]
    previous = Plan.from_dict(newest["plan"])
    tuned = newest["facts"]["tuned"]
    distribution.options = distribution.options.model_copy(update=tuned)
    distribution.join(communicator, previous, previous_ranks)
    ages: dict[Item, int] = {}
    for other in everybody:
        for item, (age, _) in other["held"].items():
            ages[item] = max(age, ages.get(item, -1))
    kept = {item: held[item].tensors for item in held if held[item].age == ages.get(item)}
    moved_bytes, received = _send(distribution, everybody, ages, kept)
    mine = {
        item: tensors
        for item, tensors in {**kept, **received}.items()
        if distribution.keeps(item, communicator.rank)
    }
    used = newest["facts"]["used"]
    lost = tuple(name for name in used if Item("factors", name) not in ages)
    return Moved(
        ResizeReport(previous, distribution.plan, moved_bytes, lost), newest["facts"], ages, mine
    )


def _send(
    distribution: Distribution,
    everybody: Sequence[dict[str, Any]],
    ages: Mapping[Item, int],
    kept: Mapping[Item, Mapping[str, Tensor]],
) -> tuple[int, dict[Item, dict[str, Tensor]]]:
    """Sends every part to the ranks that keep it and lack it; (bytes over all ranks, what came)."""
    communicator = distribution.communicator
    rank, world_size = communicator.rank, communicator.world_size
    outgoing: dict[torch.dtype, list[list[Tensor]]] = defaultdict(lambda: [[] for _ in everybody])
    incoming: dict[torch.dtype, list[list[tuple[Item, str, tuple[int, ...]]]]] = defaultdict(
        lambda: [[] for _ in everybody]
    )
    moved_bytes = 0
    for item, age in sorted(ages.items()):
        has = [other["held"].get(item, (-1,))[0] == age for other in everybody]
        source = has.index(True)
        _, tensors = everybody[source]["held"][item]
        for target in range(world_size):
            if has[target] or not distribution.keeps(item, target):
                continue
            for name, shape, dtype in tensors:
                moved_bytes += prod(shape) * dtype.itemsize
                # Every rank goes through all types in one order, whether or not it takes part.
                sends, receives = outgoing[dtype], incoming[dtype]
                if source == rank:
                    sends[target].append(kept[item][name].reshape(-1))
                if target == rank:
                    receives[source].append((item, name, shape))
    received: dict[Item, dict[str, Tensor]] = {}
    for dtype, sends in outgoing.items():
        device = distribution.layers[0].device
        flat = torch.cat([torch.empty(0, dtype=dtype, device=device), *chain(*sends)])
        expected = incoming[dtype]
        came = communicator.all_to_all(
            flat,
            tag="kfac/resize",
            send_counts=[sum(t.numel() for t in part) for part in sends],
            receive_counts=[sum(prod(shape) for *_, shape in part) for part in expected],
        )
        start = 0
        for item, name, shape in chain(*expected):
            part = came[start : start + prod(shape)].view(shape).clone()
            received.setdefault(item, {})[name] = part
            start += prod(shape)
    return moved_bytes, received
