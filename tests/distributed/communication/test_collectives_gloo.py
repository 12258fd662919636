from __future__ import annotations

import os
import time
from fractions import Fraction
from typing import Any

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError, UsageError
from support.gloo import RankFailed, run_ranks


def _every_collective() -> dict[str, Any]:
    world = Communicator.world()
    p, r = world.world_size, world.rank
    seen: dict[str, Any] = {}

    tensor = torch.arange(6, dtype=torch.float64).reshape(2, 3) + 10 * r
    world.all_reduce(tensor, tag="sum")
    seen["all_reduce"] = tensor

    transposed = (torch.arange(6, dtype=torch.float64) + 10 * r).reshape(3, 2).t()
    work = world.all_reduce(transposed, tag="strided", async_op=True)
    work.wait()
    work.wait()
    seen["strided"] = transposed

    copied = torch.full((4,), float(r), dtype=torch.float64)
    world.broadcast(copied, p - 1, tag="copy")
    seen["broadcast"] = copied

    column = torch.full((4, 2), float(r), dtype=torch.float64)
    world.broadcast(column[:, 1], p - 1, tag="column").wait()
    seen["broadcast_strided"] = column

    seen["all_gather"] = world.all_gather(torch.tensor([[r]]), tag="gather")

    part = torch.zeros(2, dtype=torch.float64)
    whole = torch.arange(2 * p, dtype=torch.float64) * (r + 1)
    world.reduce_scatter(part, whole, tag="scatter", async_op=True).wait()
    seen["reduce_scatter"] = part

    reduced = torch.full((3,), float(r + 1), dtype=torch.float64)
    world.reduce(reduced, p - 1, tag="reduce")
    seen["reduce"] = reduced

    counts = [(r + j) % 2 for j in range(p)]
    rows = torch.full((sum(counts), 2), float(r), dtype=torch.float64)
    seen["all_to_all"] = world.all_to_all(
        rows, tag="exchange", send_counts=counts, receive_counts=counts
    )
    seen["all_to_all_equal"] = world.all_to_all(
        torch.arange(p, dtype=torch.float64) + 10 * r, tag="exchange_equal"
    )

    outgoing = torch.tensor([float(r)], dtype=torch.float64)
    incoming = torch.empty(1, dtype=torch.float64)
    world.exchange(outgoing, (r + 1) % p, incoming, (r - 1) % p, tag="ring")
    seen["ring"] = incoming.item()

    seen["objects"] = world.all_gather_object({"rank": r}, tag="objects")
    seen["object"] = world.broadcast_object(("from", r), 1, tag="object")
    world.all_reduce(torch.empty(0), tag="empty")
    world.barrier()
    seen["traffic"] = world.counters.snapshot()
    return seen


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_collectives_against_closed_forms(world_size: int) -> None:
    p = world_size
    for r, seen in enumerate(run_ranks(p, _every_collective)):
        base = torch.arange(6, dtype=torch.float64)
        summed = p * base + 10 * sum(range(p))
        assert torch.equal(seen["all_reduce"], summed.reshape(2, 3))
        assert torch.equal(seen["strided"], summed.reshape(3, 2).t())
        assert seen["broadcast"].tolist() == [p - 1] * 4
        assert seen["broadcast_strided"].tolist() == [[r, p - 1]] * 4
        assert [t.tolist() for t in seen["all_gather"]] == [[[j]] for j in range(p)]
        ones = sum(range(1, p + 1))
        assert seen["reduce_scatter"].tolist() == [2 * r * ones, (2 * r + 1) * ones]
        if r == p - 1:
            assert seen["reduce"].tolist() == [ones] * 3
        expected = [[j, j] for j in range(p) if (r + j) % 2]
        assert seen["all_to_all"].tolist() == expected
        assert seen["all_to_all_equal"].tolist() == [r + 10 * j for j in range(p)]
        assert seen["ring"] == (r - 1) % p
        assert seen["objects"] == [{"rank": j} for j in range(p)]
        assert seen["object"] == ("from", 1)

        traffic = seen["traffic"]
        assert "empty" not in traffic
        assert (traffic["sum"].calls, traffic["sum"].payload_bytes) == (1, 48)
        assert traffic["sum"].received_bytes == Fraction(2 * (p - 1) * 48, p)
        assert traffic["copy"].received_bytes == (0 if r == p - 1 else 32)
        assert traffic["gather"].received_bytes == (p - 1) * 8
        assert traffic["scatter"].received_bytes == (p - 1) * 16
        assert traffic["reduce"].received_bytes == (0 if r == 0 else 24)
        others = sum((r + j) % 2 for j in range(p) if j != r)
        assert traffic["exchange"].received_bytes == others * 16
        assert traffic["ring"].calls == 2
        assert traffic["ring"].received_bytes == 8


def _subgroups() -> dict[str, Any]:
    world = Communicator.world()
    odd = world.subgroup([3, 1])
    again = world.subgroup((1, 3))
    pair = world.subgroup([0, 2, 4])
    alone = world.subgroup([2])
    everyone = world.subgroup(range(5))
    assert everyone is not None
    seen: dict[str, Any] = {"odd": odd is not None, "cached": odd is again}
    seen["alone"] = alone is not None and alone.world_size == 1
    tensor = torch.tensor([float(world.rank)])
    mine = odd if odd is not None else pair
    assert mine is not None
    seen["members"] = mine.members
    mine.broadcast(tensor, 1, tag="row")
    seen["value"] = tensor.item()
    # A group cut from a part: only that part's members call.
    if pair is not None:
        inner = pair.subgroup([1, 2])
        if inner is not None:
            tensor = torch.tensor([float(world.rank)])
            inner.all_reduce(tensor, tag="inner")
            seen["inner"] = tensor.item()
    everyone.all_reduce(tensor, tag="all")
    seen["row_calls"] = world.counters["row"].calls
    seen["timeout"] = mine._timeout()
    return seen


def test_subgroup_of_any_ranks_numbers_its_own_ranks() -> None:
    results = run_ranks(5, _subgroups, group_timeout_s=17)
    for rank, seen in enumerate(results):
        assert seen["odd"] == (rank in (1, 3))
        assert seen["cached"]
        assert seen["alone"] == (rank == 2)
        assert seen["members"] == ((1, 3) if rank in (1, 3) else (0, 2, 4))
        assert seen["value"] == (3 if rank in (1, 3) else 2)
        assert seen.get("inner") == (6 if rank in (2, 4) else None)
        assert seen["row_calls"] == 1
        assert seen["timeout"].total_seconds() == 17


def _die_in_collective(asynchronous: bool) -> str:
    world = Communicator.world()
    world.barrier()
    if world.rank == 1:
        os._exit(9)
    time.sleep(0.1)
    with pytest.raises(CommunicationError) as caught:
        world.all_reduce(torch.ones(1000), tag="factors", async_op=asynchronous).wait()
    return caught.value.line()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_dead_peer_inside_collective_is_named_on_the_others(asynchronous: bool) -> None:
    lines = run_ranks(3, _die_in_collective, asynchronous, expect_death={1}, group_timeout_s=5)
    assert lines[1] is None
    for rank in (0, 2):
        assert f"all_reduce 'factors' failed on rank {rank} of 3" in lines[rank]
        assert "a peer left the group (" in lines[rank]
        assert ".cc:" not in lines[rank]
        assert "\n" not in lines[rank]


def _silent_peer() -> str:
    world = Communicator.world()
    if world.rank == 1:
        time.sleep(1.5)
        return ""
    with pytest.raises(CommunicationError) as caught:
        world.all_reduce(torch.ones(10), tag="late")
    return caught.value.line()


def test_silent_peer_is_reported_within_the_timeout() -> None:
    lines = run_ranks(2, _silent_peer, group_timeout_s=0.5)
    assert "all_reduce 'late' failed on rank 0 of 2" in lines[0]
    assert "did not answer within the timeout" in lines[0]


def _refuses_foreign_ranks() -> None:
    world = Communicator.world()
    with pytest.raises(UsageError, match="0 to 1"):
        world.broadcast(torch.ones(1), 2, tag="x")
    with pytest.raises(UsageError, match="ranks of its communicator"):
        world.subgroup([0, 7])
    with pytest.raises(UsageError, match="reduce_scatter"):
        world.reduce_scatter(torch.ones(2), torch.ones(3), tag="x")


def test_bad_ranks_and_sizes_are_refused_before_anything_is_sent() -> None:
    run_ranks(2, _refuses_foreign_ranks)


def _raises_on_one() -> None:
    if Communicator.world().rank == 1:
        raise ValueError("told so")


def _sleeps_for_ever() -> None:
    time.sleep(1000)


def _returns() -> int:
    return Communicator.world().rank


def test_run_ranks_shows_the_failing_ranks_traceback() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 raised.*told so"):
        run_ranks(2, _raises_on_one)


def test_run_ranks_that_hang_are_ended_and_their_stacks_shown() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 0 did not finish.*_sleeps_for_ever"):
        run_ranks(1, _sleeps_for_ever, timeout_s=1.5)


def test_run_ranks_complains_when_a_rank_that_should_die_returns() -> None:
    with pytest.raises(RankFailed, match="was to die"):
        run_ranks(2, _returns, expect_death={0})
