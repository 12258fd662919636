"""Spread statistics and decompositions over several processes: grid, sharded and tree equal one process
at any world size, and go on at another one in the middle of an interval."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config.kfac import ShardedConfig
from elastic_kfac.kfac.distribution.tree import StatisticsLayout
from support.gloo import run_ranks

BATCH = 300
MIDDLE, END = 5, 9
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "parts": {"grad_worker_frac": 1e-9, "method": "inverse"},
    "apart": {"grad_worker_frac": 0.67, "colocate": False},
    "sharded": {"sharding": ShardedConfig(gather="gradients")},
    "tree": {"tree": True, "grad_worker_frac": 0.5},
}


class Run:
    def __init__(self, case: str) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(40, 280), nn.Tanh(), nn.Linear(280, 280), nn.Tanh(), nn.Linear(280, 5)]
        self.model = nn.Sequential(*layers).double()
        self.communicator = Communicator.world()
        rates = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.kfac = KFAC(
            self.model,
            lr=rates,
            process_group=self.communicator,
            damping=0.01,
            factor_update_steps=2,
            inverse_update_steps=4,
            stagger=True,
            **CASES[case],
        )
        self.uses_tree = CASES[case].get("tree", False)
        self.due: list[int] = []

    def until(self, end: int) -> dict[str, Tensor]:
        while self.kfac.steps < end:
            self.step()
        return self.model.state_dict()

    def step(self) -> None:
        size, rank = self.communicator.world_size, self.communicator.rank
        share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        generator = torch.Generator().manual_seed(self.kfac.steps)
        x = torch.randn(BATCH, 40, dtype=torch.double, generator=generator)[share]
        y = torch.randint(5, (BATCH,), generator=generator)[share]
        self.model.zero_grad()
        (F.cross_entropy(self.model(x), y, reduction="sum") / BATCH).backward()
        for p in () if self.kfac.sums_gradients else self.model.parameters():
            self.communicator.all_reduce(p.grad, tag="gradients").wait()
        statistics = None
        self.due.append(sum(map(bool, self.kfac.due)))
        if self.uses_tree and self.kfac.factors_due():
            layout = StatisticsLayout(self.kfac.layers, self.kfac.due)
            vector = torch.zeros(layout.size, dtype=torch.double)
            layout.pack(self.kfac.take_statistics(len(x), 1 / BATCH), vector)
            self.communicator.all_reduce(vector, tag="statistics").wait()
            statistics = layout.unpack(vector, BATCH)
        self.kfac.step(len(x), 1 / BATCH, statistics=statistics)
        with torch.no_grad():
            for p in self.model.parameters():
                p -= 0.1 * p.grad


def _trained(cases: list[str], saved: list[dict[str, Any]], end: int) -> list[dict[str, Any]]:
    results = []
    for case, state in zip(cases, saved or [{}] * len(cases), strict=True):
        run = Run(case)
        if state:
            run.model.load_state_dict(state["model"])
            run.kfac.load_state_dict(state["kfac"])
        model = run.until(end)
        results.append({"model": model, "kfac": run.kfac.state_dict(), "due": run.due})
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_strategy_equals_one_process_and_goes_on_in_the_middle(world_size: int) -> None:
    cases = list(CASES)
    (alone,) = run_ranks(1, _trained, cases, [], END)
    assert 0 < alone[0]["due"][1] < 3  # not all layers at once
    middle = run_ranks(world_size, _trained, cases, [], MIDDLE)[-1]
    for others in (
        *run_ranks(world_size, _trained, cases, middle, END),
        *run_ranks(1, _trained, cases, middle, END),
    ):
        for one, other in zip(alone, others, strict=True):
            for name, value in one["model"].items():
                torch.testing.assert_close(other["model"][name], value, rtol=1e-9, atol=1e-11)
            ages = [
                {
                    name: (s["inverse_step"], s["factor_updates"])
                    for name, s in x["kfac"]["layers"].items()
                }
                for x in (one, other)
            ]
            assert ages[0] == ages[1] and other["kfac"]["refresh"] == one["kfac"]["refresh"]
