"""Momentum before the preconditioner through changes of several ranks: 2, 3 and 1 end as one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config.kfac import ShardedConfig
from support.gloo import run_ranks

BATCH, PASSES = 11, 2
PHASES = (range(3), range(3, 6), range(6, 9))
OVERFLOW = 4
"""A step, among three ranks, that a scaler skips; the last rank alone sees why."""

pytestmark = pytest.mark.filterwarnings("ignore:K-FAC does not precondition")

CASES: dict[str, dict[str, Any]] = {
    "all workers": {},
    "some workers": {"grad_worker_frac": 0.5, "inverse_update_steps": 2},
    "one worker": {"grad_worker_frac": 1e-9, "method": "inverse"},
    "staggered": {"grad_worker_frac": 0.5, "stagger": True, "inverse_update_steps": 3},
    "one-sided": {"method": "one_sided"},
    "gradients of owners": {"gather": "gradients", "inverse_update_steps": 2},
    "weights of owners": {"gather": "weights", "method": "ekfac"},
}
UNPLANNED = ("all workers", "one worker")
"""Cases that go on without what the lost ranks held: every rank has factors and averages, and each step
decomposes anew."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, 3)
    ).double()


class Run:
    def __init__(self, case: str, communicator: Communicator) -> None:
        options = dict(CASES[case])
        gather = options.pop("gather", None)
        self.model, self.communicator = network(), communicator
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        self.kfac = KFAC(
            self.model,
            lr=self.optimizer,
            sharding=ShardedConfig(gather=gather) if gather else None,
            process_group=communicator,
            grad_scaler=self.scaler,
            **{"momentum": 0.8, "factor_update_steps": 1, "inverse_update_steps": 1, **options},
        )

    def train(self, steps: range) -> None:
        ranks, rank = self.communicator.world_size, self.communicator.rank
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(7, (BATCH, 3), generator=generator)
            labels = torch.randint(3, (BATCH,), generator=generator)
            self.optimizer.zero_grad()
            for number in range(PASSES):
                share = slice(rank * PASSES + number, None, ranks * PASSES)
                output = self.model(tokens[share])
                loss = F.cross_entropy(output, labels[share], reduction="sum") / BATCH
                if step == OVERFLOW and rank == ranks - 1:
                    loss = loss * torch.inf
                self.scaler.scale(loss).backward()
            if not self.kfac.sums_gradients:
                for p in self.model.parameters():
                    self.communicator.all_reduce(p.grad, tag="gradients").wait()
            self.scaler.unscale_(self.optimizer)
            self.kfac.step(loss_scale_per_sample=1 / BATCH)
            if not self.kfac.updates_weights:
                self.scaler.step(self.optimizer)
            self.scaler.update()

    def found(self) -> dict[str, Any]:
        state = self.kfac.state_dict()
        return {
            "weights": copy.deepcopy(self.model.state_dict()),
            "average": state["trust_region"]["average"],
            "steps": self.kfac.steps,
            "skipped": state["counters"].get("skipped_steps", 0),
        }

    def follow(self, model: dict[str, Tensor], communicator: Communicator) -> None:
        """Goes on among other ranks, with the weights of those that went furthest."""
        self.model.load_state_dict(model)
        self.communicator = communicator
        self.kfac.resize(communicator)


def _two_three_one(case: str, planned: bool) -> list[dict[str, Any]]:
    """What each phase ends with, on the ranks that took part."""
    world = Communicator.world()
    pair = world.subgroup([0, 1])
    run = Run(case, pair or Communicator.solo())
    found = []
    if pair is not None:
        run.train(PHASES[0])
        found.append(run.found())
    weights = world.broadcast_object(run.model.state_dict(), 0, tag="test")
    run.follow(weights, world)
    run.train(PHASES[1])
    found.append(run.found())
    state = run.kfac.state_dict() if planned else None
    if world.rank == 0:
        run.follow(run.model.state_dict(), Communicator.solo())
        if state is not None:
            run.kfac.load_state_dict(state)
        run.train(PHASES[2])
        found.append(run.found())
    return found


def _all_cases() -> dict[str, list[dict[str, Any]]]:
    cases = [(case, True) for case in CASES] + [(case, False) for case in UNPLANNED]
    return {f"{case} {planned}": _two_three_one(case, planned) for case, planned in cases}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[dict[str, Any]]]]:
    return run_ranks(3, _all_cases)


@pytest.mark.parametrize(
    ("case", "planned"),
    [*((case, True) for case in CASES), *((case, False) for case in UNPLANNED)],
)
def test_two_three_and_one_ranks_end_as_one_process(
    case: str, planned: bool, ranks: list[dict[str, list[dict[str, Any]]]]
) -> None:
    alone, expected = Run(case, Communicator.solo()), []
    for steps in PHASES:
        alone.train(steps)
        expected.append(alone.found())
    assert expected[-1]["steps"] == 8 and expected[-1]["skipped"] == 1
    results = [rank[f"{case} {planned}"] for rank in ranks]
    assert [len(found) for found in results] == [3, 2, 1]
    for found, right in (
        *zip(results[0], expected, strict=True),
        *zip(results[1], expected[:2], strict=True),
        (results[2][0], expected[1]),
    ):
        assert set(found["average"]) == set(alone.kfac.factors())
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)
