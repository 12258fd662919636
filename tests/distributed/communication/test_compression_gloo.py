from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.compression import CompressedAllReduce
from elastic_kfac.communication.wire_formats import WIRE_FORMATS, wire_format
from elastic_kfac.errors import StateError
from support.gloo import run_ranks

_COUNT = 700
_STEPS = 6


def _gradient(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(_COUNT, generator=generator, dtype=torch.float64)


def _all_formats() -> dict[str, Any]:
    world = Communicator.world()
    seen: dict[str, Any] = {}
    for name in WIRE_FORMATS:
        reducer = CompressedAllReduce(world, wire_format(name, topk_ratio=0.05), seed=4)
        sums = []
        for step in range(_STEPS):
            tensor = _gradient(world.rank, step).view(7, 100)
            reducer.all_reduce(tensor, step=step, tag=name)
            sums.append(tensor.view(-1).clone())
        state = reducer.state_dict()
        seen[name] = (sums, state.get(name), world.counters[name])
    narrow = CompressedAllReduce(world, wire_format("fp32"))
    tensor = _gradient(world.rank, 0).float()
    narrow.all_reduce(tensor, step=0, tag="narrow")
    seen["narrow"] = tensor
    return seen


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_compressed_sums_bytes_and_telescoping(world_size: int) -> None:
    p = world_size
    exact = [
        torch.stack([_gradient(rank, step) for rank in range(p)]).sum(0) for step in range(_STEPS)
    ]
    tolerance = {"fp32": 1e-6, "bf16": 0.05, "fp16": 0.01, "int8": 0.2}
    results = run_ranks(p, _all_formats)
    for seen in results:
        torch.testing.assert_close(seen["narrow"], exact[0].float(), rtol=0, atol=1e-5)
        for name in WIRE_FORMATS:
            sums, residual, traffic = seen[name]
            for one, other in zip(sums, results[0][name][0], strict=True):
                assert torch.equal(one, other)  # the same bits on every rank
            if name in tolerance:
                for one, total in zip(sums, exact, strict=True):
                    assert (one - total).abs().max() < tolerance[name] * p
            if name in ("int8", "topk"):
                # What was sent and what is kept is what was to be sent.
                total = torch.stack(exact).sum(0)
                torch.testing.assert_close(
                    torch.stack(sums).sum(0) + residual, total, rtol=0, atol=1e-12
                )
            else:
                assert residual is None
            assert traffic.calls == _STEPS * (1 if name == "topk" else 2)
    wire = wire_format("topk", topk_ratio=0.05)
    expected = _STEPS * (p - 1) * wire.encoded_bytes(_COUNT)
    assert results[0]["topk"][2].received_bytes == expected
    bounds = [_COUNT * part // p for part in range(p + 1)]
    for rank, seen in enumerate(results):
        for name in ("bf16", "fp16", "int8"):
            wire = wire_format(name)
            sizes = [wire.encoded_bytes(b - a) for a, b in pairwise(bounds)]
            received = (p - 1) * (sizes[rank] + max(sizes))
            assert seen[name][2].received_bytes == _STEPS * received


def _leave_one() -> dict[str, Any]:
    world = Communicator.world()
    wire = wire_format("topk", topk_ratio=0.02)
    reducer = CompressedAllReduce(world, wire)
    sent = torch.zeros(_COUNT, dtype=torch.float64)
    for step in range(3):
        tensor = _gradient(world.rank, step)
        reducer.all_reduce(tensor, step=0, tag="w")
        sent += tensor
    state = reducer.state_dict()
    for members in ([0, 2], [2]):
        remaining = world.subgroup(members)
        if remaining is None:
            return {}
        reducer = CompressedAllReduce(remaining, wire)
        reducer.load_state_dict(state)
        tensor = _gradient(world.rank, 3)
        reducer.all_reduce(tensor, step=0, tag="w")
        sent += tensor
        state = reducer.state_dict()
    return {"sent": sent, "state": state}


def test_residual_sum_survives_leaving_ranks() -> None:
    seen = run_ranks(3, _leave_one)[2]
    offered = sum(_gradient(rank, step) for rank in range(3) for step in range(3))
    offered = offered + _gradient(0, 3) + 2 * _gradient(2, 3)
    assert isinstance(offered, torch.Tensor)
    # Alone, the last rank sends everything that was kept.
    assert seen["state"] == {}
    torch.testing.assert_close(seen["sent"], offered, rtol=0, atol=1e-12)


def _overflow() -> list[bool]:
    world = Communicator.world()
    reducer = CompressedAllReduce(world, wire_format("int8"))
    finite = []
    for value in (1.0, float("inf"), 1.0):
        tensor = torch.full((10,), value)
        reducer.all_reduce(tensor, step=0, tag="w")
        finite.append(bool(torch.isfinite(tensor).all()))
    return finite


def test_overflowed_gradient_is_seen_and_does_not_stay() -> None:
    assert run_ranks(2, _overflow) == [[True, False, True]] * 2


def test_residual_of_a_strange_shape_is_refused() -> None:
    reducer = CompressedAllReduce(Communicator.solo(), wire_format("int8"))
    with pytest.raises(StateError, match="given: w"):
        reducer.load_state_dict({"w": torch.ones(2, 2)})
