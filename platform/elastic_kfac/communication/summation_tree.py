"""Sums whose bits do not depend on the world size: one fixed binary tree over logical shards.

Floating point addition is not associative, so a sum over ranks changes with their number. Here the
leaves are a fixed number of logical shards (a power of two), whoever computes them, and every addition
is an addition of the one binary tree above them. A rank owns a range of leaves; what it can add up
alone are exactly the maximal aligned subtrees inside of its range. Those travel, and every rank
finishes the same tree. A leaf without samples is no leaf: None + x = x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import UsageError

SMALL_BYTES = 4 * 2**20
"""Up to this size every rank gets all partial sums; larger vectors are cut into one part per rank."""
_ALIGNMENT = 16
"""Elements; parts of a cut vector begin on cache lines."""


class Node(NamedTuple):
    """The subtree over the leaves [offset · 2^level, (offset + 1) · 2^level)."""

    level: int
    offset: int

    @property
    def leaves(self) -> range:
        """The leaves below it."""
        return range(self.offset << self.level, (self.offset + 1) << self.level)


def shard_range(num_samples: int, num_shards: int, shard: int) -> tuple[int, int]:
    """(first sample, count) of a logical shard of a batch; depends on nothing else.

    Shard v holds `n // V + (v < n mod V)` samples, so the shards without samples are the last ones.
    """
    size, rest = divmod(num_samples, num_shards)
    return shard * size + min(shard, rest), size + (shard < rest)


def shards_of_rank(rank: int, world_size: int, num_shards: int) -> range:
    """The logical shards that a rank computes; with larger ranges first, few subtrees are cut."""
    first, count = shard_range(num_shards, world_size, rank)
    return range(first, first + count)


def shards_of_ranks(world_size: int, num_shards: int) -> list[range]:
    """`shards_of_rank` of every rank."""
    return [shards_of_rank(rank, world_size, num_shards) for rank in range(world_size)]


def maximal_subtrees(leaves: range) -> list[Node]:
    """The maximal aligned subtrees inside of a range of leaves, from left to right."""
    nodes: list[Node] = []
    for leaf in leaves:
        nodes.append(Node(0, leaf))
        while len(nodes) > 1 and _are_siblings(nodes[-2], nodes[-1]):
            nodes.pop()
            left = nodes.pop()
            nodes.append(Node(left.level + 1, left.offset >> 1))
    return nodes


def _are_siblings(left: Node, right: Node) -> bool:
    return left.level == right.level and left.offset % 2 == 0 and right.offset == left.offset + 1


class PartialSums:
    """Adds up the leaves of one rank as they come, with few live buffers.

    A binary counter: siblings are merged at once, by an addition in place into the left one, whose
    right sibling's buffer is free for a later leaf. Leaves are pushed from left to right.
    """

    def __init__(self, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Buffers are vectors [capacity]."""
        self._capacity, self._size = capacity, capacity
        self._dtype, self._device = dtype, device
        self._free: list[Tensor] = []
        self._stack: list[tuple[Node, Tensor | None]] = []
        self.buffers_made = 0

    def buffer(self) -> Tensor:
        """A vector [capacity] for the next leaf; it holds whatever an earlier sum left there."""
        if self._free:
            return self._free.pop()
        self.buffers_made += 1
        return torch.zeros(self._capacity, dtype=self._dtype, device=self._device)

    def push(self, leaf: int, value: Tensor | None) -> None:
        """Adds a leaf; `value` came from `buffer()`, or is None for a shard without samples."""
        self._stack.append((Node(0, leaf), value))
        while len(self._stack) > 1 and _are_siblings(self._stack[-2][0], self._stack[-1][0]):
            _, right = self._stack.pop()
            node, left = self._stack.pop()
            if left is None:
                left = right
            elif right is not None:
                left[: self._size].add_(right[: self._size])
                self._free.append(right)
            self._stack.append((Node(node.level + 1, node.offset >> 1), left))

    def partials(self) -> list[tuple[Node, Tensor | None]]:
        """The maximal aligned subtrees so far, from left to right: vectors [size]."""
        size = self._size
        return [(node, None if value is None else value[:size]) for node, value in self._stack]

    def restart(self, size: int | None = None) -> None:
        """Forgets the sums and keeps the buffers; from now on only the first `size` elements count."""
        self._free += [value for _, value in self._stack if value is not None]
        self._stack = []
        self._size = self._capacity if size is None else size


def finish_tree(partials: Mapping[Node, Tensor | None], num_shards: int) -> Tensor | None:
    """The sum of all leaves from maximal subtrees that cover them; the tensors are consumed.

    Raises:
        UsageError: If leaves are missing.
    """
    return _value(Node(num_shards.bit_length() - 1, 0), partials)


def _value(node: Node, partials: Mapping[Node, Tensor | None]) -> Tensor | None:
    if node in partials:
        return partials[node]
    if node.level == 0:
        raise UsageError("the summation tree has no value for a leaf", given=node.offset)
    left = _value(Node(node.level - 1, 2 * node.offset), partials)
    right = _value(Node(node.level - 1, 2 * node.offset + 1), partials)
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)


def exchange_partials(
    communicator: Communicator,
    partials: Sequence[tuple[Node, Tensor | None]],
    flags: Tensor,
    *,
    size: int,
    num_shards: int,
    num_filled: int,
    tag: str,
    ranges: Sequence[range] | None = None,
    small_bytes: int = SMALL_BYTES,
) -> tuple[Tensor, Tensor]:
    """Finishes the tree over all ranks. Collective.

    Args:
        communicator: Ranks that each pushed the leaves of their range.
        partials: What this rank's `PartialSums` left.
        flags: [k]: numbers that are summed over the ranks in the ordinary way, on the same trip;
            small integers, because their sum is exact in any order.
        num_shards: Leaves of the tree, a power of two.
        num_filled: Leaves that hold samples (the first ones).
        ranges: The leaves of every rank, in order; None for `shards_of_ranks`.
        small_bytes: Up to this size an all-gather of whole partial sums is used.

    Returns:
        The sum [size], equal in every bit on every rank and for every world size, and the summed
        flags. The sum may be one of the partial sums' buffers.
    """
    world_size = communicator.world_size
    own = [value for _, value in partials if value is not None]
    if world_size == 1:
        total = finish_tree(dict(partials), num_shards)
        return (flags.new_zeros(size) if total is None else total), flags
    ranges = ranges or shards_of_ranks(world_size, num_shards)
    filled = [_filled(leaves, num_filled) for leaves in ranges]
    most = max(len(nodes) for nodes in filled)
    if most * size * flags.element_size() <= small_bytes:
        message = flags.new_zeros(most * size + len(flags))
        for index, value in enumerate(own):
            message[index * size : (index + 1) * size] = value
        message[most * size :] = flags
        received = communicator.all_gather(message, tag=tag)
        nodes = {
            node: received[rank][index * size : (index + 1) * size]
            for rank, known in enumerate(filled)
            for index, node in enumerate(known)
        }
        total = finish_tree(_with_empty(nodes, ranges), num_shards)
        flags = torch.stack([part[most * size :] for part in received]).sum(0)
        return (flags.new_zeros(size) if total is None else total), flags
    part = -(-size // (world_size * _ALIGNMENT)) * _ALIGNMENT
    mine = filled[communicator.rank]
    outgoing = flags.new_zeros(world_size, len(mine), part)
    for index, value in enumerate(own):
        for peer in range(world_size):
            piece = value[peer * part : (peer + 1) * part]
            outgoing[peer, index, : len(piece)] = piece
    arrived = communicator.all_to_all(
        outgoing.view(-1, part),
        tag=tag,
        send_counts=[len(mine)] * world_size,
        receive_counts=[len(known) for known in filled],
    )
    rows = iter(arrived.unbind(0))
    nodes = {node: next(rows) for known in filled for node in known}
    total = finish_tree(_with_empty(nodes, ranges), num_shards)
    message = flags.new_zeros(part + len(flags))
    if total is not None:
        message[:part] = total
    message[part:] = flags
    parts = torch.stack(communicator.all_gather(message, tag=tag))
    return parts[:, :part].reshape(-1)[:size], parts[:, part:].sum(0)


def _filled(leaves: range, num_filled: int) -> list[Node]:
    """The subtrees of a rank that hold samples: what it has to send."""
    return [node for node in maximal_subtrees(leaves) if node.leaves.start < num_filled]


def _with_empty(nodes: Mapping[Node, Tensor], ranges: Sequence[range]) -> dict[Node, Tensor | None]:
    complete: dict[Node, Tensor | None] = dict(nodes)
    for leaves in ranges:
        for node in maximal_subtrees(leaves):
            complete.setdefault(node, None)
    return complete
