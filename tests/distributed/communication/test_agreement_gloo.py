from __future__ import annotations

import pytest

from elastic_kfac.communication.agreement import require_agreement
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError
from support.gloo import run_ranks


def _disagree() -> list[str]:
    world = Communicator.world()
    same = {"lr": 0.1, "layer conv1": (64, 9)}
    require_agreement(world, same, what="the configuration")
    lines = []
    for facts in (
        {**same, "damping": 0.1 if world.rank == 1 else 0.2},
        {**same, "x": world.rank, **({"layer fc": (10, 5)} if world.rank else {})},
        {**same, **({"layer fc": (10, 5)} if world.rank else {})},
    ):
        with pytest.raises(CommunicationError) as caught:
            require_agreement(world, facts, what="the configuration")
        lines.append(caught.value.line())
    return lines


def test_differing_facts_are_named_with_their_ranks_on_every_rank() -> None:
    results = run_ranks(3, _disagree)
    assert all(lines == results[0] for lines in results)
    first, second, third = results[0]
    assert "the configuration: damping is 0.2 on ranks 0,2, 0.1 on rank 1;" in first
    assert "x is 0 on rank 0, 1 on rank 1, 2 on rank 2 (and 1 more);" in second
    assert "layer fc is absent on rank 0, (10, 5) on ranks 1,2;" in third


def test_one_rank_always_agrees() -> None:
    require_agreement(Communicator.solo(), {"a": 1}, what="anything")
