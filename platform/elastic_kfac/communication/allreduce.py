"""All-reduce algorithms over point-to-point messages, open between their two phases.

A reduce-scatter leaves the sum of one part at each owner; an all-gather copies the parts to all ranks.
Between the phases an owner may change its part, for example precondition a gradient, without a byte
more than the all-reduce (Yokota 2018; Osawa et al., CVPR 2019). For n elements on p ranks, per rank:

    ring            2 (p-1) steps; sends all parts but one per phase: 2 (p-1)/p n
    rabenseifner    2 log2 p steps, 2 (p-1)/p n (recursive halving, then doubling; Rabenseifner 2004).
                    With q = 2^floor(log2 p) < p the p - q extra ranks first add their vector into a
                    neighbour and get the result back: two more steps, of n elements
    hierarchical    ring inside a node, Rabenseifner between ranks of equal position of all nodes, ring
                    inside: with d ranks per node a rank sends only n/d over the slow network (x 2)

A step is one round of messages in which a rank sends to at most one peer and receives from at most one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol, get_args

from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import ConfigError, UsageError

Algorithm = Literal["native", "ring", "rabenseifner", "hierarchical"]
Topology = tuple[tuple[int, ...], ...]
"""The ranks of every node."""


class Transport(Protocol):
    """Ranks that exchange point-to-point messages."""

    rank: int
    world_size: int

    def exchange(
        self, outgoing: Tensor | None, dst: int, incoming: Tensor | None, src: int
    ) -> None:
        """Sends to `dst` and receives from `src` at once; None or an empty tensor is no message."""


class _Subset:
    """Some ranks of a transport, renumbered."""

    def __init__(self, inner: Transport, ranks: Sequence[int]) -> None:
        self._inner = inner
        self._ranks = tuple(ranks)
        self.rank = self._ranks.index(inner.rank)
        self.world_size = len(self._ranks)

    def exchange(
        self, outgoing: Tensor | None, dst: int, incoming: Tensor | None, src: int
    ) -> None:
        self._inner.exchange(outgoing, self._ranks[dst], incoming, self._ranks[src])


@dataclass(frozen=True)
class Halfway:
    """An all-reduce after its first phase: this rank owns the sum of one part."""

    flat: Tensor
    start: int
    """Position of the owned part in `flat`."""
    part: Tensor
    """A view of the owned part; it may be changed in place before `all_gather`."""
    finish: Callable[[], None]

    def all_gather(self) -> Tensor:
        """The second phase: the parts of all owners on every rank."""
        self.finish()
        return self.flat


def reduce_scatter(
    transport: Transport,
    flat: Tensor,
    algorithm: Algorithm = "ring",
    *,
    topology: Topology | None = None,
    sizes: Sequence[int] | None = None,
) -> Halfway:
    """The first phase on `flat` [n], in place.

    Args:
        flat: Contiguous vector; parts of other owners hold partial sums afterwards.
        topology: Nodes, for `hierarchical`; by default all ranks are one node.
        sizes: Sizes of the parts, one per rank (ring only); by default as equal as possible.

    Raises:
        ConfigError: If the algorithm has no phases.
        UsageError: If the sizes or the topology do not fit.
    """
    if flat.dim() != 1 or not flat.is_contiguous():
        raise UsageError("an all-reduce needs a flat contiguous vector", given=tuple(flat.shape))
    p = transport.world_size
    if sizes is not None and (algorithm != "ring" or len(sizes) != p or sum(sizes) != flat.numel()):
        raise UsageError(
            "part sizes are for the ring: one per rank, together the vector",
            given=f"{algorithm} with sizes {list(sizes)}",
        )
    if algorithm == "ring":
        bounds = _even_bounds(flat.numel(), p) if sizes is None else [0, *accumulate(sizes)]
        return _ring(transport, flat, bounds)
    if algorithm == "rabenseifner":
        return _rabenseifner(transport, flat)
    if algorithm == "hierarchical":
        return _hierarchical(transport, flat, (tuple(range(p)),) if topology is None else topology)
    raise ConfigError(
        "no all-reduce algorithm of this name has two phases",
        given=algorithm,
        allowed="ring, rabenseifner, hierarchical",
    )


class CommunicatorTransport:
    """The ranks of a communicator, which counts the messages under `tag`."""

    def __init__(self, communicator: Communicator, *, tag: str) -> None:
        self.rank = communicator.rank
        self.world_size = communicator.world_size
        self._communicator = communicator
        self._tag = tag

    def exchange(
        self, outgoing: Tensor | None, dst: int, incoming: Tensor | None, src: int
    ) -> None:
        self._communicator.exchange(outgoing, dst, incoming, src, tag=self._tag)


def allreduce(
    communicator: Communicator,
    tensor: Tensor,
    algorithm: Algorithm = "native",
    *,
    topology: Topology | None = None,
    tag: str,
) -> None:
    """Sums `tensor` over all ranks in place; `native` is the backend's own all-reduce.

    Raises:
        ConfigError: If the algorithm is unknown.
        CommunicationError: If a peer left.
    """
    if algorithm not in get_args(Algorithm):
        raise ConfigError(
            "unknown all-reduce algorithm",
            given=algorithm,
            allowed=", ".join(get_args(Algorithm)),
        )
    if algorithm == "native":
        communicator.all_reduce(tensor, tag=tag)
        return
    if communicator.world_size == 1 or tensor.numel() == 0:
        return
    flat = tensor.contiguous().view(-1)
    transport = CommunicatorTransport(communicator, tag=tag)
    reduce_scatter(transport, flat, algorithm, topology=topology).all_gather()
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.shape))


def nodes_by_name(names: Sequence[str]) -> Topology:
    """The topology of ranks on hosts with these names."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        nodes.setdefault(name, []).append(rank)
    return tuple(tuple(ranks) for ranks in nodes.values())


# -- the algorithms -------------------------------------------------------------------------------


def _even_bounds(n: int, parts: int) -> list[int]:
    return [n * part // parts for part in range(parts + 1)]


def _ring(world: Transport, flat: Tensor, bounds: Sequence[int]) -> Halfway:
    p, rank = world.world_size, world.rank
    right, left = (rank + 1) % p, (rank - 1) % p

    def part(index: int) -> Tensor:
        return flat[bounds[index % p] : bounds[index % p + 1]]

    for step in range(p - 1):
        own = part(rank - 2 - step)
        incoming = flat.new_empty(own.shape)
        world.exchange(part(rank - 1 - step), right, incoming, left)
        own.add_(incoming)

    def gather() -> None:
        for step in range(p - 1):
            world.exchange(part(rank - step), right, part(rank - step - 1), left)

    return Halfway(flat, bounds[rank], part(rank), gather)


def _rabenseifner(world: Transport, flat: Tensor) -> Halfway:
    p, rank, n = world.world_size, world.rank, flat.numel()
    q = 1 << (p.bit_length() - 1)
    extra = p - q
    # Ranks 2 i + 1 < 2 extra add their vector into rank 2 i and wait for the result.
    if rank < 2 * extra and rank % 2:
        return _folded(world, flat, rank - 1)
    if rank < 2 * extra:
        incoming = flat.new_empty(n)
        world.exchange(None, rank + 1, incoming, rank + 1)
        flat.add_(incoming)
    index = rank // 2 if rank < 2 * extra else rank - extra
    bounds = _even_bounds(n, q)

    def rank_of(core: int) -> int:
        return 2 * core if core < extra else core + extra

    low, high = 0, q
    windows = []
    while high - low > 1:
        half = (high - low) // 2
        peer = rank_of(index ^ half)
        kept, given = (low, low + half), (low + half, high)
        if index & half:
            kept, given = given, kept
        windows.append((peer, kept, given))
        own = flat[bounds[kept[0]] : bounds[kept[1]]]
        incoming = flat.new_empty(own.shape)
        world.exchange(flat[bounds[given[0]] : bounds[given[1]]], peer, incoming, peer)
        own.add_(incoming)
        low, high = kept

    def gather() -> None:
        for peer, kept, given in reversed(windows):
            own = flat[bounds[kept[0]] : bounds[kept[1]]]
            world.exchange(own, peer, flat[bounds[given[0]] : bounds[given[1]]], peer)
        if rank < 2 * extra:
            world.exchange(flat, rank + 1, None, rank + 1)

    return Halfway(flat, bounds[index], flat[bounds[index] : bounds[index + 1]], gather)


def _folded(world: Transport, flat: Tensor, partner: int) -> Halfway:
    """A rank beyond the power of two: owns nothing, gives its vector and gets the result."""
    world.exchange(flat, partner, None, partner)
    return Halfway(flat, 0, flat[:0], lambda: world.exchange(None, partner, flat, partner))


def _hierarchical(transport: Transport, flat: Tensor, topology: Topology) -> Halfway:
    if sorted(rank for node in topology for rank in node) != list(range(transport.world_size)):
        raise UsageError(
            "a topology names every rank once",
            given=topology,
            allowed=f"the ranks 0 to {transport.world_size - 1}",
        )
    node = next(ranks for ranks in topology if transport.rank in ranks)
    # As many shards as the smallest node has ranks; ranks beyond own an empty part of the ring.
    shards = min(len(ranks) for ranks in topology)
    bounds = _even_bounds(flat.numel(), shards) + [flat.numel()] * (len(node) - shards)
    inside = _Subset(transport, node)
    ring = _ring(inside, flat, bounds)
    if inside.rank >= shards:
        return Halfway(flat, 0, flat[:0], ring.finish)
    column = [ranks[inside.rank] for ranks in topology]
    between = _rabenseifner(_Subset(transport, column), ring.part)

    def gather() -> None:
        between.finish()
        ring.finish()

    return Halfway(flat, ring.start + between.start, between.part, gather)
