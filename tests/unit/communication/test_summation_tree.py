"""The canonical summation tree, simulated in plain Python for every world size up to 64."""

from __future__ import annotations

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.summation_tree import (
    Node,
    PartialSums,
    exchange_partials,
    finish_tree,
    maximal_subtrees,
    shard_range,
    shards_of_rank,
)
from elastic_kfac.errors import UsageError


def brute_force_maximal(leaves: range, num_shards: int) -> list[Node]:
    """Every aligned subtree inside the range whose parent is not inside."""
    inside = [
        Node(level, index)
        for level in range(num_shards.bit_length())
        for index in range(num_shards >> level)
        if set(Node(level, index).leaves) <= set(leaves)
    ]
    found = [n for n in inside if Node(n.level + 1, n.offset >> 1) not in inside]
    return sorted(found, key=lambda node: node.leaves.start)


@pytest.mark.parametrize("num_shards", [1, 2, 4, 8, 16, 64])
def test_partials_for_every_world_size_are_the_maximal_aligned_subtrees(num_shards: int) -> None:
    for world_size in range(1, 65):
        covered: list[int] = []
        for rank in range(world_size):
            leaves = shards_of_rank(rank, world_size, num_shards)
            nodes = maximal_subtrees(leaves)
            assert nodes == brute_force_maximal(leaves, num_shards)
            covered += [leaf for node in nodes for leaf in node.leaves]
        assert covered == list(range(num_shards))


def test_number_of_partials_per_rank_is_small() -> None:
    def most(num_shards: int, world_size: int) -> int:
        ranges = [shards_of_rank(rank, world_size, num_shards) for rank in range(world_size)]
        return max(len(maximal_subtrees(leaves)) for leaves in ranges)

    assert [most(8, world_size) for world_size in range(1, 9)] == [1, 1, 2, 1, 1, 1, 1, 1]
    assert max(most(64, world_size) for world_size in range(1, 65)) <= 6


@pytest.mark.parametrize(("num_shards", "num_filled"), [(8, 8), (8, 3), (64, 64), (64, 1)])
def test_sum_of_any_world_size_has_the_bits_of_one_process(
    num_shards: int, num_filled: int
) -> None:
    generator = torch.Generator().manual_seed(num_shards + num_filled)
    leaves = torch.randn(num_shards, 33, generator=generator) * torch.logspace(-4, 4, 33)
    expected: torch.Tensor | None = None
    for world_size in range(1, 65):
        nodes: dict[Node, torch.Tensor | None] = {}
        for rank in range(world_size):
            sums = PartialSums(33, dtype=torch.float32, device=torch.device("cpu"))
            own = shards_of_rank(rank, world_size, num_shards)
            for leaf in own:
                if leaf >= num_filled:
                    sums.push(leaf, None)
                    continue
                buffer = sums.buffer()
                sums.push(leaf, buffer.copy_(leaves[leaf]))
            assert sums.buffers_made <= num_shards.bit_length()  # log2 V + 1
            assert [node for node, _ in sums.partials()] == maximal_subtrees(own)
            nodes.update(sums.partials())
        total = finish_tree(nodes, num_shards)
        assert total is not None
        expected = total.clone() if expected is None else expected
        assert torch.equal(total, expected), world_size


def test_plain_sums_by_rank_differ_in_their_bits() -> None:
    # The control: without the tree the same leaves do depend on the world size.
    generator = torch.Generator().manual_seed(0)
    leaves = torch.randn(8, 1000, generator=generator)
    results = []
    for world_size in (1, 3):
        total = torch.zeros(1000)
        for rank in range(world_size):
            own = torch.zeros(1000)
            for leaf in shards_of_rank(rank, world_size, 8):
                own += leaves[leaf]
            total += own
        results.append(total)
    assert not torch.equal(*results)


@pytest.mark.parametrize(("num_samples", "num_shards"), [(50, 8), (3, 8), (8, 8), (0, 4), (7, 1)])
def test_shards_of_a_batch_are_consecutive_and_differ_by_at_most_one(
    num_samples: int, num_shards: int
) -> None:
    ranges = [shard_range(num_samples, num_shards, shard) for shard in range(num_shards)]
    positions = [p for first, count in ranges for p in range(first, first + count)]
    assert positions == list(range(num_samples))
    counts = [count for _, count in ranges]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


def test_restarted_partial_sums_use_their_buffers_again() -> None:
    sums = PartialSums(4, dtype=torch.float32, device=torch.device("cpu"))
    for _ in range(3):
        for leaf in range(8):
            sums.push(leaf, sums.buffer().fill_(1))
        ((node, total),) = sums.partials()
        assert node == Node(3, 0) and total is not None and total.tolist() == [8.0] * 4
        sums.restart()
    sums.restart(2)
    for leaf in range(8):
        sums.push(leaf, sums.buffer().fill_(2))
    assert [value.tolist() for _, value in sums.partials() if value is not None] == [[16.0, 16.0]]
    assert sums.buffers_made == 4


def test_missing_leaf_is_an_error() -> None:
    with pytest.raises(UsageError, match="no value for a leaf"):
        finish_tree({Node(1, 0): torch.ones(1)}, 4)


def test_alone_without_any_sample_the_sum_is_zero() -> None:
    partials: list[tuple[Node, torch.Tensor | None]] = [(Node(2, 0), None)]
    total, flags = exchange_partials(
        Communicator.solo(),
        partials,
        torch.ones(2),
        size=3,
        num_shards=4,
        num_filled=0,
        tag="sums",
    )
    assert total.tolist() == [0.0] * 3 and flags.tolist() == [1.0, 1.0]
