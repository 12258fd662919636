from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from elastic_kfac.communication.allreduce import (
    Algorithm,
    Topology,
    Transport,
    nodes_by_name,
    reduce_scatter,
)
from elastic_kfac.errors import ConfigError, UsageError


class _Wires:
    """Ranks as threads; every ordered pair has a first-in-first-out wire."""

    def __init__(self, world_size: int) -> None:
        self.queues: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {
            (a, b): queue.Queue() for a in range(world_size) for b in range(world_size)
        }


class _ThreadTransport:
    def __init__(self, wires: _Wires, rank: int, world_size: int) -> None:
        self.wires, self.rank, self.world_size = wires, rank, world_size
        self.sent: list[tuple[int, int]] = []
        """(destination, elements) of every message."""
        self.received = 0
        self.steps = 0

    def exchange(
        self, outgoing: torch.Tensor | None, dst: int, incoming: torch.Tensor | None, src: int
    ) -> None:
        self.steps += 1
        if outgoing is not None and outgoing.numel():
            assert dst != self.rank
            self.sent.append((dst, outgoing.numel()))
            self.wires.queues[self.rank, dst].put(outgoing.clone())
        if incoming is not None and incoming.numel():
            received = self.wires.queues[src, self.rank].get(timeout=10)
            assert received.shape == incoming.shape
            incoming.copy_(received)
            self.received += received.numel()

    @property
    def sent_elements(self) -> int:
        return sum(size for _, size in self.sent)


def _on_all(world_size: int, body: Callable[[_ThreadTransport], Any]) -> list[Any]:
    wires = _Wires(world_size)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = body(_ThreadTransport(wires, rank, world_size))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert all(q.empty() for q in wires.queues.values())
    return results


def _vector(rank: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-1000, 1000, (n,), generator=generator).double()


def _sum(world_size: int, n: int) -> torch.Tensor:
    return torch.stack([_vector(rank, n) for rank in range(world_size)]).sum(0)


def _run(
    world_size: int,
    n: int,
    algorithm: Algorithm,
    topology: Topology | None = None,
) -> list[tuple[torch.Tensor, _ThreadTransport, int]]:
    def body(transport: _ThreadTransport) -> Any:
        flat = _vector(transport.rank, n)
        halfway = reduce_scatter(transport, flat, algorithm, topology=topology)
        owned = halfway.part.clone()
        total = _sum(world_size, n)
        assert torch.equal(owned, total[halfway.start : halfway.start + owned.numel()])
        result = halfway.all_gather()
        assert result is flat
        return result, transport, owned.numel()

    return _on_all(world_size, body)


@pytest.mark.parametrize("algorithm", ["ring", "rabenseifner", "hierarchical"])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_allreduce_equals_the_sum_for_any_ranks_and_ragged_lengths(
    algorithm: Algorithm, world_size: int
) -> None:
    for n in (0, 1, 3, world_size, 5 * world_size + 2, 64):
        results = _run(world_size, n, algorithm)
        for result, _, _ in results:
            assert torch.equal(result, _sum(world_size, n))
        assert sum(owned for _, _, owned in results) == n


@pytest.mark.parametrize("world_size", range(1, 9))
def test_ring_counters_equal_the_formula(world_size: int) -> None:
    p, n = world_size, 24 * 35  # divisible by every p up to 8
    for _, counted, _ in _run(p, n, "ring"):
        assert counted.steps == 2 * (p - 1)
        assert counted.sent_elements == counted.received == 2 * (p - 1) * n // p


@pytest.mark.parametrize("world_size", range(1, 9))
def test_rabenseifner_counters_equal_the_formula(world_size: int) -> None:
    p, n = world_size, 24 * 35
    q = 2 ** int(math.log2(p))
    results = _run(p, n, "rabenseifner")
    assert max(c.steps for _, c, _ in results) == 2 * int(math.log2(q)) + (2 if p > q else 0)
    for rank, (_, counter, owned) in enumerate(results):
        core = 2 * (q - 1) * n // q
        if rank < 2 * (p - q):
            folded = rank % 2 == 1
            assert counter.sent_elements == counter.received == n + (0 if folded else core)
            assert owned == (0 if folded else n // q)
        else:
            assert counter.sent_elements == counter.received == core


@pytest.mark.parametrize(
    "topology",
    [
        ((0, 1), (2, 3)),
        ((0, 2, 4), (1, 3, 5)),
        ((0, 1, 2), (3, 4), (5, 6, 7)),
        ((0,), (1, 2, 3)),
        ((0, 1, 2, 3, 4),),
        ((0,), (1,), (2,)),
    ],
)
def test_hierarchical_sums_and_sends_one_shard_between_nodes(topology: Topology) -> None:
    world_size = sum(map(len, topology))
    n = 24 * 35
    results = _run(world_size, n, "hierarchical", topology)
    widest, smallest = max(map(len, topology)), min(map(len, topology))
    p = len(topology)
    q = 2 ** int(math.log2(p))
    steps = 2 * (widest - 1) + 2 * int(math.log2(q)) + (2 if p > q else 0)
    node_of = {rank: index for index, node in enumerate(topology) for rank in node}
    assert max(counted.steps for _, counted, _ in results) == steps
    for rank, (result, counted, _) in enumerate(results):
        assert torch.equal(result, _sum(world_size, n))
        outside = sum(size for dst, size in counted.sent if node_of[dst] != node_of[rank])
        if p == q:
            position = topology[node_of[rank]].index(rank)
            shard = n // smallest if position < smallest else 0
            assert outside == 2 * (q - 1) * shard // q
    if len({len(node) for node in topology}) == 1 and p == q:
        d = widest
        inside = 2 * (d - 1) * n // d
        across = 2 * (p - 1) * (n // d) // p
        assert all(counted.sent_elements == inside + across for _, counted, _ in results)
        assert all(counted.steps == steps for _, counted, _ in results)


@pytest.mark.parametrize("algorithm", ["ring", "rabenseifner", "hierarchical"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_function_between_the_phases_equals_function_of_the_sum_at_no_extra_traffic(
    algorithm: Algorithm, world_size: int
) -> None:
    n = 37
    scale = torch.arange(n, dtype=torch.float64)

    def body(transport: Transport) -> Any:
        halfway = reduce_scatter(transport, _vector(transport.rank, n), algorithm)
        halfway.part.mul_(scale[halfway.start : halfway.start + halfway.part.numel()])
        return halfway.all_gather(), transport

    plain = _run(world_size, n, algorithm)
    for (result, counted), (_, without, _) in zip(_on_all(world_size, body), plain, strict=True):
        assert torch.equal(result, _sum(world_size, n) * scale)
        assert (counted.sent, counted.steps) == (without.sent, without.steps)


def test_ring_with_owners_of_unequal_parts() -> None:
    sizes = [0, 7, 1, 0]

    def body(transport: Transport) -> Any:
        flat = _vector(transport.rank, 8)
        halfway = reduce_scatter(transport, flat, "ring", sizes=sizes)
        part = halfway.part.clone()
        return part, halfway.all_gather(), transport

    total = _sum(4, 8)
    for rank, (part, whole, counter) in enumerate(_on_all(4, body)):
        start = sum(sizes[:rank])
        assert torch.equal(part, total[start : start + sizes[rank]])
        assert torch.equal(whole, total)
        after = sizes[(rank + 1) % 4]
        assert counter.sent_elements == 8 - sizes[rank] + 8 - after


def test_allreduce_refuses_what_does_not_fit() -> None:
    alone = _ThreadTransport(_Wires(1), 0, 1)
    with pytest.raises(ConfigError, match="ring, rabenseifner, hierarchical"):
        reduce_scatter(alone, torch.ones(2), "native")
    with pytest.raises(UsageError, match="flat contiguous"):
        reduce_scatter(alone, torch.ones(2, 2), "ring")
    with pytest.raises(UsageError, match="one per rank"):
        reduce_scatter(alone, torch.ones(2), "ring", sizes=[1])
    with pytest.raises(UsageError, match="every rank once"):
        reduce_scatter(alone, torch.ones(2), "hierarchical", topology=((0, 1),))


def test_nodes_by_name_groups_ranks_of_a_host() -> None:
    assert nodes_by_name(["a", "b", "a", "c"]) == ((0, 2), (1,), (3,))
