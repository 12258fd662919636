from __future__ import annotations

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.counters import CommunicationCounters, Traffic
from elastic_kfac.errors import UsageError


def test_solo_collectives_are_identities_and_count_nothing() -> None:
    solo = Communicator.world()
    assert (solo.rank, solo.world_size, solo.group) == (0, 1, None)
    tensor = torch.tensor([1.0, 2.0])
    solo.all_reduce(tensor, tag="a", async_op=True).wait()
    solo.broadcast(tensor, 0, tag="b")
    solo.reduce(tensor, 0, tag="b")
    part = torch.empty(2)
    solo.reduce_scatter(part, tensor, tag="c")
    gathered = solo.all_gather(tensor, tag="d")
    assert torch.equal(solo.all_to_all(tensor, tag="e"), tensor)
    assert tensor.tolist() == part.tolist() == gathered[0].tolist() == [1.0, 2.0]
    assert len(gathered) == 1
    assert solo.all_gather_object("x", tag="f") == ["x"]
    assert solo.broadcast_object("x", 0, tag="f") == "x"
    solo.barrier()
    inner = solo.subgroup([0])
    assert inner is not None and inner.world_size == 1
    assert solo.counters.snapshot() == {}


def test_solo_refuses_other_ranks() -> None:
    with pytest.raises(UsageError, match="no such rank"):
        Communicator.solo().broadcast(torch.ones(1), 1, tag="x")


def test_counters_add_and_reset() -> None:
    counters = CommunicationCounters()
    counters.add("factors", 100, 50)
    counters.add("factors", 10, 5)
    counters.add("gradients", 1, 1)
    assert counters["factors"] == Traffic(2, 110, 55)
    assert counters.total() == Traffic(3, 111, 56)
    assert counters["never"] == Traffic()
    assert set(counters.snapshot()) == {"factors", "gradients"}
    counters.reset()
    assert counters.snapshot() == {}
