"""Synchronised BatchNorm equals BatchNorm on the concatenated batch, for unequal and empty shares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.training.sync.exchange import Exchange, Totals
from elastic_kfac.training.sync.sync_batch_norm import (
    SyncBatchNorm,
    statistics_group,
    synchronise_batch_norm,
)
from support.gloo import run_ranks

COUNT = 9
EDGES = {2: [0, 2, 9], 3: [0, 5, 5, 9]}


def network(momentum: float | None = 0.1, affine: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 2),
        nn.BatchNorm2d(3, momentum=momentum, affine=affine),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, momentum=momentum),
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = 20 + torch.randn(COUNT, 2, 3, 3, dtype=torch.float64, generator=generator)
    return images, torch.randn(COUNT, 4, dtype=torch.float64, generator=generator)


def passes(model: nn.Module, part: slice, steps: int) -> dict[str, Any]:
    seen: dict[str, Any] = {"outputs": [], "inputs": []}
    for step in range(steps):
        images, weights = batch(step)
        own = images[part].clone().requires_grad_()
        outputs = model(own)
        (outputs.sin() * weights[part]).sum().backward()
        seen["outputs"].append(outputs.detach())
        seen["inputs"].append(own.grad)
    seen["gradients"] = [p.grad for p in model.parameters()]
    seen["buffers"] = dict(model.named_buffers())
    return seen


CASES = ((0.1, True), (None, True), (0.1, False))


def run_all() -> list[dict[str, Any]]:
    world = Communicator.world()
    edges = EDGES[world.world_size]
    part = slice(edges[world.rank], edges[world.rank + 1])
    seen = []
    for momentum, affine in CASES:
        model = synchronise_batch_norm(network(momentum, affine), world)
        seen.append(passes(model, part, 3))
    return seen


@pytest.mark.parametrize("world_size", [2, 3])
def test_group_of_unequal_shares_equals_one_process(world_size: int) -> None:
    results = run_ranks(world_size, run_all)
    tolerance = {"rtol": 0, "atol": 1e-10}
    for index, (momentum, affine) in enumerate(CASES):
        expected = passes(network(momentum, affine), slice(None), 3)
        for kind in ("outputs", "inputs"):
            for step in range(3):
                ours = torch.cat([seen[index][kind][step] for seen in results])
                torch.testing.assert_close(ours, expected[kind][step], **tolerance)
        for number, gradient in enumerate(expected["gradients"]):
            total = sum(seen[index]["gradients"][number] for seen in results)
            torch.testing.assert_close(total, gradient, **tolerance)
        for seen in results:
            for name, tensor in expected["buffers"].items():
                torch.testing.assert_close(seen[index]["buffers"][name], tensor, **tolerance)


def run_groups() -> dict[str, Any]:
    world = Communicator.world()
    group = statistics_group(world, 2)
    model = synchronise_batch_norm(network(), world, group_size=2)
    images, _ = batch(0)
    part = slice(3 * world.rank, 3 * world.rank + 3)
    with torch.no_grad():
        outputs = model(images[part])
    failure = ""
    try:
        synchronise_batch_norm(nn.BatchNorm1d(2), world)(torch.ones(int(world.rank == 0), 2))
    except UsageError as error:
        failure = str(error)
    return {"size": group.world_size, "outputs": outputs, "failure": failure}


def test_groups_of_two_share_statistics_and_the_rest_is_alone() -> None:
    results = run_ranks(3, run_groups)
    assert [seen["size"] for seen in results] == [2, 2, 1]
    images, _ = batch(0)
    with torch.no_grad():
        together, alone = network()(images[:6]), network()(images[6:])
    ours = torch.cat([seen["outputs"] for seen in results])
    torch.testing.assert_close(ours, torch.cat([together, alone]), rtol=0, atol=1e-10)
    assert all("more than one value" in seen["failure"] for seen in results)


class CalledTwice(nn.Module):
    """One batch norm on two parts of its input, each with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(2).double()
        nn.init.normal_(self.norm.weight)

    def forward(self, images: Tensor) -> Tensor:
        first, second = (self.norm(part) for part in images.split([1, 2], 2))
        return torch.cat((first.flatten(1), 3 * second.flatten(1).sin()), 1)


def fisher_of_calls() -> Tensor:
    world = Communicator.world()
    edges = EDGES[world.world_size] if world.world_size > 1 else [0, COUNT]
    part = slice(edges[world.rank], edges[world.rank + 1])
    model = synchronise_batch_norm(CalledTwice(), world)
    kfac = KFAC(
        model, kl_clip=None, bn_fisher="full", loss_scale_per_sample=1 / COUNT, process_group=world
    )
    (model(batch(0)[0][part]).sin().square().sum() / COUNT).backward()
    kfac.step()
    return kfac.factors()["norm"]["F"]


def test_kfac_knows_the_statistics_of_every_call() -> None:
    expected = fisher_of_calls()
    for found in run_ranks(2, fisher_of_calls):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def run_exchange() -> dict[str, Tensor]:
    """The trainer's own weighted sum of batch statistics, on top of synchronised ones."""
    world = Communicator.world()
    edges = EDGES[world.world_size] if world.world_size > 1 else [0, COUNT]
    part = slice(edges[world.rank], edges[world.rank + 1])
    model = synchronise_batch_norm(network(), world)
    return one_exchange(model, world, part)


def one_exchange(model: nn.Module, world: Communicator, part: slice) -> dict[str, Tensor]:
    exchange = Exchange(model)
    images, weights = batch(0)
    exchange.begin_step()
    exchange.begin_pass()
    ((model(images[part]).sin() * weights[part]).sum() / COUNT).backward()
    count = len(images[part])
    exchange.end_pass(count)
    totals = exchange.reduce(world, Totals(count=count))
    exchange.publish_gradients(1.0)
    exchange.finish_step(totals.count)
    result = {name: tensor.clone() for name, tensor in model.named_buffers()}
    result.update({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return result


def test_step_of_the_trainer_does_not_depend_on_the_world_size() -> None:
    expected = one_exchange(network(), Communicator.solo(), slice(None))
    assert len(expected) == 14
    for world_size in (2, 3):
        for seen in run_ranks(world_size, run_exchange):
            for name, tensor in expected.items():
                torch.testing.assert_close(seen[name], tensor, rtol=0, atol=1e-10, msg=name)


def test_conversion_keeps_parameters_names_mode_and_numbers() -> None:
    model = network()
    model[1].eval()
    before = dict(model.named_parameters())
    reference = copy.deepcopy(model)
    converted = synchronise_batch_norm(model, Communicator.solo())
    assert converted is model and isinstance(model[1], SyncBatchNorm)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(reference.state_dict())
    assert (model[1].training, model[5].training) == (False, True)
    images, _ = batch(0)
    torch.testing.assert_close(model(images), reference(images), rtol=0, atol=0)
    assert isinstance(synchronise_batch_norm(nn.BatchNorm1d(2), Communicator.solo()), SyncBatchNorm)
    with pytest.raises(ConfigError, match="positive"):
        synchronise_batch_norm(network(), Communicator.solo(), group_size=0)
