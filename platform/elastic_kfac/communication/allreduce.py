"""All-reduce algorithms over point-to-point messages, open in the middle.

Each algorithm has two phases: a reduce-scatter after which every owner holds the sum of one part, and
an all-gather of the parts. `reduce_scatter_then` stops in between and lets a function change the part
that this rank owns; K-FAC fits there without a byte more than the all-reduce (Yokota 2018; Osawa et
al., CVPR 2019). For n elements on p ranks, per rank:

    ring            2 (p-1) steps; sends all parts but one per phase: 2 (p-1)/p n
    rabenseifner    2 log2 p steps, 2 (p-1)/p n (recursive halving, then doubling; Rabenseifner 2004).
                    With q = 2^floor(log2 p) < p the p - q extra ranks first add their vector into a
                    neighbour and get the result back: two more steps, of n elements
    hierarchical    ring inside a node, Rabenseifner between the nodes' ranks of equal position, ring
                    inside: on d ranks per node a rank sends only n/d over the slow network (x 2)

A step is one round of messages in which a rank sends to at most one peer and receives from at most
one. Ranks that sit out a round count it, so steps are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol, get_args

from torch import Tensor

from elastic_kfac.communication.collectives import Communicator, Work
from elastic_kfac.errors import ConfigError, UsageError

Algorithm = Literal["native", "ring", "rabenseifner", "hierarchical"]
Topology = tuple[tuple[int, ...], ...]
"""The ranks of every node."""
PartFunction = Callable[[Tensor, int], Tensor]
"""(summed part, its first element's position) -> the part's new values."""


class Transport(Protocol):
    """What the algorithms need to know about the world."""

    rank: int
    world_size: int

    def exchange(
        self, outgoing: Tensor | None, dst: int, incoming: Tensor | None, src: int
    ) -> None:
        """Send to `dst` and receive from `src` at once; None or empty means nothing."""


@dataclass
class StepCounter:
    """Rounds and elements of one all-reduce, on this rank."""

    steps: int = 0
    sent_elements: int = 0
    received_elements: int = 0


class _Subset:
    """Some ranks of a transport, renumbered; counts what passes."""

    def __init__(self, inner: Transport, ranks: Sequence[int], counter: StepCounter) -> None:
        self._inner = inner
        self._ranks = tuple(ranks)
        self._counter = counter
        self.rank = self._ranks.index(inner.rank)
        self.world_size = len(self._ranks)

    def exchange(
        self, outgoing: Tensor | None, dst: int, incoming: Tensor | None, src: int
    ) -> None:
        self._counter.steps += 1
        self._counter.sent_elements += 0 if outgoing is None else outgoing.numel()
        self._counter.received_elements += 0 if incoming is None else incoming.numel()
        self._inner.exchange(outgoing, self._ranks[dst], incoming, self._ranks[src])

    def idle(self, rounds: int = 1) -> None:
        """Sit out rounds in which others exchange."""
        self._counter.steps += rounds


class Halfway:
    """An all-reduce after its first phase: this rank owns the sum of one part."""

    def __init__(
        self,
        flat: Tensor,
        start: int,
        stop: int,
        finish: Callable[[], None],
        counter: StepCounter,
    ) -> None:
        self._flat = flat
        self._finish = finish
        self.start = start
        self.part = flat[start:stop]
        self.counter = counter

    def apply(self, function: PartFunction) -> Halfway:
        """Replace the owned part by `function(part, start)`."""
        if self.part.numel():
            self.part.copy_(function(self.part, self.start))
        return self

    def all_gather(self) -> Tensor:
        """The second phase: everybody's part on every rank."""
        self._finish()
        return self._flat


def reduce_scatter(
    transport: Transport,
    flat: Tensor,
    algorithm: Algorithm = "ring",
    *,
    topology: Topology | None = None,
    sizes: Sequence[int] | None = None,
) -> Halfway:
    """The first phase on `flat` [n], in place; `part` of the result holds this rank's summed part.

    Args:
        transport: the ranks.
        flat: contiguous vector; other parts hold partial sums afterwards.
        algorithm: `ring`, `rabenseifner` or `hierarchical`.
        topology: nodes, for `hierarchical`.
        sizes: of the parts (ring only): one per rank, for owners of unequal parts. Otherwise the
            parts are as equal as possible.

    Raises:
        ConfigError: an algorithm that has no phases.
        UsageError: sizes or a topology that do not fit.
    """
    if flat.dim() != 1 or not flat.is_contiguous():
        raise UsageError("an all-reduce needs a flat contiguous vector", given=tuple(flat.shape))
    counter = StepCounter()
    everyone = _Subset(transport, range(transport.world_size), counter)
    if sizes is not None and (
        algorithm != "ring" or len(sizes) != everyone.world_size or sum(sizes) != flat.numel()
    ):
        raise UsageError(
            "part sizes are for the ring: one per rank, together the vector",
            given=f"{algorithm} with sizes {list(sizes)}",
        )
    if algorithm == "ring":
        bounds = (
            _even_bounds(flat.numel(), everyone.world_size)
            if sizes is None
            else ([0, *accumulate(sizes)])
        )
        return _ring(everyone, flat, bounds, counter)
    if algorithm == "rabenseifner":
        return _rabenseifner(everyone, flat, counter)
    if algorithm == "hierarchical":
        nodes = ((*range(transport.world_size),),) if topology is None else topology
        return _hierarchical(transport, flat, nodes, counter)
    raise ConfigError(
        "no all-reduce algorithm of this name has two phases",
        given=algorithm,
        allowed="ring, rabenseifner, hierarchical",
    )


def reduce_scatter_then(
    transport: Transport,
    flat: Tensor,
    function: PartFunction,
    algorithm: Algorithm = "ring",
    *,
    topology: Topology | None = None,
    sizes: Sequence[int] | None = None,
) -> Halfway:
    """Reduce-scatter `flat`, apply `function` to the owned part; follow with `.all_gather()`."""
    halfway = reduce_scatter(transport, flat, algorithm, topology=topology, sizes=sizes)
    return halfway.apply(function)


class CommunicatorTransport:
    """The ranks of a communicator; messages are counted there under `tag`."""

    def __init__(self, communicator: Communicator, *, tag: str) -> None:
        self.rank = communicator.rank
        self.world_size = communicator.world_size
        self._communicator = communicator
        self._tag = tag

    def exchange(
        self, outgoing: Tensor | None, dst: int, incoming: Tensor | None, src: int
    ) -> None:
        """See `Transport`."""
        self._communicator.exchange(outgoing, dst, incoming, src, tag=self._tag)


def allreduce(
    communicator: Communicator,
    tensor: Tensor,
    algorithm: Algorithm = "native",
    *,
    topology: Topology | None = None,
    tag: str,
) -> Work:
    """Sum `tensor` over all ranks in place; `native` is the backend's own, started asynchronously.

    The others return when they are done. `hierarchical` without a topology takes all ranks as one
    node.

    Raises:
        ConfigError: an unknown algorithm.
        CommunicationError: a peer left.
    """
    if algorithm not in get_args(Algorithm):
        raise ConfigError(
            "unknown all-reduce algorithm",
            given=algorithm,
            allowed=", ".join(get_args(Algorithm)),
        )
    if algorithm == "native":
        return communicator.all_reduce(tensor, tag=tag, async_op=True)
    if communicator.world_size == 1 or tensor.numel() == 0:
        return Work()
    flat = tensor.contiguous().view(-1)
    transport = CommunicatorTransport(communicator, tag=tag)
    reduce_scatter(transport, flat, algorithm, topology=topology).all_gather()
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.shape))
    return Work()


def nodes_by_name(names: Sequence[str]) -> Topology:
    """The topology of ranks whose hosts have these names (gather them once per world size)."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        nodes.setdefault(name, []).append(rank)
    return tuple(tuple(ranks) for ranks in nodes.values())


# -- the algorithms -------------------------------------------------------------------------------


def _even_bounds(n: int, parts: int) -> list[int]:
    return [n * part // parts for part in range(parts + 1)]


def _ring(world: _Subset, flat: Tensor, bounds: Sequence[int], counter: StepCounter) -> Halfway:
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

    return Halfway(flat, bounds[rank], bounds[rank + 1], gather, counter)


def _rabenseifner(world: _Subset, flat: Tensor, counter: StepCounter) -> Halfway:
    p, rank, n = world.world_size, world.rank, flat.numel()
    q = 1 << (p.bit_length() - 1)
    extra, rounds = p - q, q.bit_length() - 1
    # Ranks 2 i + 1 < 2 extra add their vector into rank 2 i and wait for the result.
    if rank < 2 * extra and rank % 2:
        return _folded(world, flat, rank - 1, 2 * rounds, counter)
    if rank < 2 * extra:
        incoming = flat.new_empty(n)
        world.exchange(None, rank + 1, incoming, rank + 1)
        flat.add_(incoming)
    elif extra:
        world.idle()
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
        elif extra:
            world.idle()

    return Halfway(flat, bounds[index], bounds[index + 1], gather, counter)


def _folded(world: _Subset, flat: Tensor, partner: int, idle: int, counter: StepCounter) -> Halfway:
    """A rank beyond the power of two: owns nothing, gives its vector and gets the result."""
    world.exchange(flat, partner, None, partner)

    def gather() -> None:
        world.idle(idle)
        world.exchange(None, partner, flat, partner)

    return Halfway(flat, 0, 0, gather, counter)


def _hierarchical(
    transport: Transport, flat: Tensor, topology: Topology, counter: StepCounter
) -> Halfway:
    if sorted(rank for node in topology for rank in node) != list(range(transport.world_size)):
        raise UsageError(
            "a topology names every rank once",
            given=topology,
            allowed=f"the ranks 0 to {transport.world_size - 1}",
        )
    node = next(ranks for ranks in topology if transport.rank in ranks)
    widest = max(len(ranks) for ranks in topology)
    # As many shards as the smallest node has ranks; ranks beyond own an empty part of the ring.
    shards = min(len(ranks) for ranks in topology)
    shard_bounds = _even_bounds(flat.numel(), shards)
    bounds = shard_bounds + [flat.numel()] * (len(node) - shards)
    inside = _Subset(transport, node, counter)
    ring = _ring(inside, flat, bounds, counter)
    inside.idle(widest - len(node))
    position = inside.rank
    rounds = _rabenseifner_phase_rounds(len(topology))
    if position >= shards:
        between = None
        inside.idle(rounds)
        start = stop = 0
    else:
        column = [ranks[position] for ranks in topology]
        between = _rabenseifner(_Subset(transport, column, counter), ring.part, counter)
        start = ring.start + between.start
        stop = start + between.part.numel()

    def gather() -> None:
        if between is None:
            inside.idle(rounds)
        else:
            between.all_gather()
        ring.all_gather()
        inside.idle(widest - len(node))

    return Halfway(flat, start, stop, gather, counter)


def _rabenseifner_phase_rounds(p: int) -> int:
    q = 1 << (p.bit_length() - 1)
    return (q.bit_length() - 1) + (1 if p > q else 0)
