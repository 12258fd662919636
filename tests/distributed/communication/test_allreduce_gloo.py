from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from elastic_kfac.communication.allreduce import Algorithm, allreduce
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import ConfigError
from support.gloo import run_ranks

_SHAPES = [(7,), (3, 4), (0,), ()]


def _tensors(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    made = [torch.randint(-99, 99, shape, generator=generator).double() for shape in _SHAPES]
    return [*made, torch.randint(-99, 99, (4, 5), generator=generator).double().t()]


def _run_all() -> dict[str, Any]:
    world = Communicator.world()
    p = world.world_size
    topology = (tuple(range(0, p, 2)), tuple(range(1, p, 2)))
    seen: dict[str, Any] = {}
    for algorithm in get_args(Algorithm):
        tensors = _tensors(world.rank)
        for tensor in tensors:
            allreduce(world, tensor, algorithm, topology=topology, tag=algorithm)
        seen[algorithm] = [tensor.clone() for tensor in tensors]
    world.counters.reset()
    allreduce(world, torch.ones(30 * p, dtype=torch.float64), "ring", tag="counted")
    seen["counted"] = world.counters["counted"].received_bytes
    with pytest.raises(ConfigError, match="native, ring"):
        allreduce(world, torch.ones(1), "tree", tag="x")  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_algorithms_over_gloo_equal_the_sum(world_size: int) -> None:
    everybody = [_tensors(rank) for rank in range(world_size)]
    for seen in run_ranks(world_size, _run_all):
        assert seen.pop("counted") == 2 * (world_size - 1) * 30 * 8
        for tensors in seen.values():
            for index, tensor in enumerate(tensors):
                assert torch.equal(tensor, torch.stack([r[index] for r in everybody]).sum(0))
