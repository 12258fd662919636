"""Every kind of layer over several processes: grid, sharded and tree equal one process, at any world
size."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config.kfac import ShardedConfig
from elastic_kfac.kfac.distribution.tree import StatisticsLayout
from elastic_kfac.kfac.shapes import layer_shape
from elastic_kfac.placement.costs import factor_elements
from support.gloo import run_ranks

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
BATCH = 7
CASES: dict[str, dict[str, Any]] = {
    "whole": {"grad_worker_frac": 1.0},
    "parts": {"grad_worker_frac": 1e-9, "method": "inverse", "stagger": True},
    "sharded": {"sharding": ShardedConfig(gather="gradients")},
    "sharded weights": {"sharding": ShardedConfig(gather="weights")},
    "tree": {"tree": True, "grad_worker_frac": 0.5},
}


class Net(nn.Module):
    """All kinds that were not there from the start."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1, output_padding=1)
        self.volume = nn.Conv3d(3, 2, (1, 1, 3))
        self.up_volume = nn.ConvTranspose3d(2, 4, (1, 1, 2), groups=2, bias=False)
        self.norm = nn.RMSNorm(4)
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down_lora, self.up_lora = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(torch.tanh(self.conv(x))))  # [n, 3, 2 * length]
        x = self.up_volume(torch.tanh(self.volume(x[:, :, None, None]))).flatten(2).mT
        x = self.decoder(torch.tanh(self.encoder(self.norm(x))))
        out: Tensor = (self.base(x) + 0.5 * self.up_lora(self.down_lora(x))).mean(1)
        return out


class Run:
    """A model and its preconditioner on the ranks of a communicator."""

    def __init__(self, case: str, communicator: Communicator) -> None:
        self.model = Net()
        self.communicator = communicator
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            options = {"damping": 0.01, "inverse_update_steps": 2, **CASES[case]}
            rates = torch.optim.SGD(self.model.parameters(), lr=0.1)
            self.kfac = KFAC(self.model, lr=rates, process_group=communicator, **options)
        self.uses_tree = options.get("tree", False)

    def train(self, steps: range) -> dict[str, Tensor]:
        for step in steps:
            self.step(step)
        return self.model.state_dict()

    def step(self, step: int) -> None:
        size, rank = self.communicator.world_size, self.communicator.rank
        share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 2, 4, dtype=torch.double, generator=generator)[share]
        y = torch.randint(5, (BATCH,), generator=generator)[share]
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.model.zero_grad()
        (F.cross_entropy(self.model(x), y, reduction="sum") / BATCH).backward()
        for p in () if self.kfac.sums_gradients else weights:
            self.communicator.all_reduce(p.grad, tag="gradients").wait()
        if self.uses_tree:
            layout = StatisticsLayout(self.kfac.layers)
            vector = torch.zeros(layout.size, dtype=torch.double)
            layout.pack(self.kfac.take_statistics(len(x), 1 / BATCH), vector)
            self.communicator.all_reduce(vector, tag="statistics").wait()
            self.kfac.step(statistics=layout.unpack(vector, BATCH))
        else:
            self.kfac.step(num_samples=len(x), loss_scale_per_sample=1 / BATCH)
        if self.kfac.updates_weights:
            return
        with torch.no_grad():
            for p in weights:
                assert p.grad is not None
                p -= 0.1 * p.grad


def assert_equal(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, **TOLERANCE)


def _saved() -> list[dict[str, Any]]:
    """Trained for three steps, by case."""
    saved = []
    for case in CASES:
        run = Run(case, Communicator.world())
        run.train(range(3))
        saved.append({"model": run.model.state_dict(), "kfac": run.kfac.state_dict()})
    return saved


def _resumed(saved: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Trained for two more."""
    results = []
    for case, state in zip(CASES, saved, strict=True):
        run = Run(case, Communicator.world())
        run.model.load_state_dict(state["model"])
        run.kfac.load_state_dict(state["kfac"])
        results.append(run.train(range(3, 5)))
    return results


def test_any_strategy_equals_one_process_and_continues_at_another_world_size() -> None:
    solo = [Run(case, Communicator.solo()).train(range(5)) for case in CASES]
    first = Run("whole", Communicator.solo())
    first.train(range(3))
    saved = run_ranks(2, _saved)
    for states in saved:
        assert_equal(states[0]["model"], first.model.state_dict())
        for state in states:
            assert state["kfac"]["layers"].keys() == first.kfac.state_dict()["layers"].keys()
    for world_size in (1, 3):
        for results in run_ranks(world_size, _resumed, saved[1]):
            for result, expected in zip(results, solo, strict=True):
                assert_equal(result, expected)


def _resized() -> list[dict[str, Tensor]]:
    """Three ranks, then two of them, then three again with a newcomer in the third place."""
    world, results = Communicator.world(), []
    for case in ("whole", "parts"):
        pair = world.subgroup([0, 1])
        run = Run(case, world)
        run.train(range(2))
        state = run.kfac.state_dict()
        if pair is not None:
            run.kfac.resize(pair)
            run.kfac.load_state_dict(state)
            run.communicator = pair
            run.train(range(2, 4))
        else:
            run = Run(case, Communicator.solo())
        for tensor in run.model.state_dict().values():
            world.broadcast(tensor, 0, tag="model").wait()
        run.kfac.resize(world)
        run.communicator = world
        results.append(run.train(range(4, 6)))
    return results


def test_resize_in_a_living_process_equals_one_process() -> None:
    solo = [Run(case, Communicator.solo()).train(range(6)) for case in ("whole", "parts")]
    for results in run_ranks(3, _resized):
        for result, expected in zip(results, solo, strict=True):
            assert_equal(result, expected)


def test_the_plan_counts_what_every_kind_holds() -> None:
    kfac = Run("whole", Communicator.solo()).kfac
    shapes = {layer.name: layer_shape(layer) for layer in kfac.layers}
    assert (shapes["conv"].a_dim, shapes["conv"].g_dim, shapes["conv"].copies) == (4, 2, 2)
    assert (shapes["up"].a_dim, shapes["up"].g_dim) == (4 * 3 + 1, 3)
    assert (shapes["volume"].a_dim, shapes["volume"].g_dim) == (3 * 3 + 1, 2)
    assert (shapes["up_volume"].a_dim, shapes["up_volume"].copies) == (2, 2)
    assert (shapes["encoder"].a_dim, shapes["encoder"].weight_elements) == (4 + 2, 4 * 4 + 4 + 4)
    assert (shapes["norm"].a_dim, shapes["norm"].g_dim) == (0, 0)
    run = Run("whole", Communicator.solo())
    run.train(range(1))
    factors = run.kfac.factors()
    held = {name: sum(t.numel() for t in own.values()) for name, own in factors.items()}
    assert run.kfac.memory_usage()["factors"] == 8 * sum(held.values())
    del held["norm"]
    assert held == {name: factor_elements([shapes[name]]) for name in held}


def table_gradient() -> Tensor:
    """Of a table whose rows the ranks look up apart, summed by a collective and by nothing else."""
    world = Communicator.world()
    ids = torch.randint(2048, (2, 3, 6), generator=torch.Generator().manual_seed(1))
    own = ids[world.rank] if world.world_size > 1 else ids.flatten(0, 1)
    torch.manual_seed(0)
    table = nn.Embedding(2048, 64).double()
    kfac = KFAC(table, lr=0.1, loss_reduction="mean", loss_scale_per_sample=1 / 6)
    for _ in range(2):
        table.zero_grad()
        (table(own).square().sum() / 6).backward()
        assert table.weight.grad is not None
        if world.world_size > 1:
            dist.all_reduce(table.weight.grad)
        kfac.step()
    return table.weight.grad


def test_rows_of_a_table_that_other_ranks_looked_up_are_preconditioned() -> None:
    expected = table_gradient()
    for found in run_ranks(2, table_gradient):
        torch.testing.assert_close(found, expected, **TOLERANCE)
