from __future__ import annotations

from typing import Any

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.packing import Bucketer, triangle_size
from support.gloo import run_ranks


def _tensors(rank: int) -> list[tuple[torch.Tensor, bool]]:
    generator = torch.Generator().manual_seed(rank)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randint(-50, 50, shape, generator=generator).to(dtype)

    square = draw(3, 5, 5)
    strided = draw(4, 6).t()
    return [
        (square + square.transpose(-1, -2), True),
        (strided, False),
        (draw(7, dtype=torch.float32), False),
        (draw(2, 2), False),
        (draw(0, 4), False),
        (draw(), False),
        (draw(60), False),
        ((lambda m: m + m.t())(draw(4, 4)).t(), True),
        (draw(3, dtype=torch.float32), False),
    ]


def _exchange(cap_bytes: int) -> dict[str, Any]:
    world = Communicator.world()
    summed = _tensors(world.rank)
    bucketer = Bucketer(world, tag="sum", cap_bytes=cap_bytes)
    for tensor, symmetric in summed:
        bucketer.all_reduce(tensor, symmetric=symmetric)
    bucketer.flush().wait()

    copied = _tensors(world.rank)
    bucketer = Bucketer(world, tag="copy", cap_bytes=cap_bytes)
    for index, (tensor, symmetric) in enumerate(copied):
        bucketer.broadcast(tensor, index % world.world_size, symmetric=symmetric)
    bucketer.flush().wait()
    bucketer.flush().wait()
    return {
        "summed": [tensor.clone() for tensor, _ in summed],
        "copied": [tensor.clone() for tensor, _ in copied],
        "traffic": world.counters.snapshot(),
    }


def _wire_elements(tensor: torch.Tensor, symmetric: bool) -> int:
    if not symmetric:
        return tensor.numel()
    n = tensor.shape[-1]
    return tensor.numel() // (n * n) * triangle_size(n)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("cap_bytes", [0, 300, 1 << 20])
def test_bucketer_equals_tensor_by_tensor_and_counts_its_bytes(
    world_size: int, cap_bytes: int
) -> None:
    everybody = [_tensors(rank) for rank in range(world_size)]
    size = sum(_wire_elements(t, s) * t.element_size() for t, s in everybody[0])
    for seen in run_ranks(world_size, _exchange, cap_bytes):
        for index, tensor in enumerate(seen["summed"]):
            expected = sum(tensors[index][0] for tensors in everybody)
            assert torch.equal(tensor, expected)
        for index, tensor in enumerate(seen["copied"]):
            assert torch.equal(tensor, everybody[index % world_size][index][0])
        assert seen["traffic"]["sum"].payload_bytes == size
        assert seen["traffic"]["copy"].payload_bytes == size
        calls = {0: 8, 300: 5, 1 << 20: 2}[cap_bytes]
        assert seen["traffic"]["sum"].calls == calls


def _symmetric_savings() -> list[int]:
    world = Communicator.world()
    matrix = torch.eye(10, dtype=torch.float64)
    for tag, symmetric in (("dense", False), ("packed", True)):
        bucketer = Bucketer(world, tag=tag)
        bucketer.all_reduce(matrix, symmetric=symmetric)
        bucketer.flush().wait()
    return [world.counters["dense"].payload_bytes, world.counters["packed"].payload_bytes]


def test_symmetric_tensors_send_n_n_plus_one_halves() -> None:
    assert run_ranks(2, _symmetric_savings) == [[800, 440]] * 2
