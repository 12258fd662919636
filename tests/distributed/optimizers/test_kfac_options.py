"""What one distribution can do, all can: every option, sharded and on the grid, equals one process."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config.kfac import (
    LevenbergMarquardt,
    MilestoneSchedule,
    ShardedConfig,
    WarmupSchedule,
)
from support.gloo import run_ranks

BATCH, STEPS = 8, 5
TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}

pytestmark = pytest.mark.filterwarnings("ignore:factors wider than max_factor_dim")


class Sequence(nn.Module):
    """Convolution, embedding, normalisation, attention, and weights shared by positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(1, 4, (1, 3), padding=(0, 1))
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Sequential(nn.Linear(4, 36), nn.Tanh(), nn.Linear(36, 3))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.conv(tokens[:, None, None].double())[:, :, 0].mT
        x = self.norm(x)
        return self.out(x + self.attention(x, x, x)[0]).mean(1)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "inverse": {"method": "inverse", "inverse_damping": "sqrt"},
    "precompute": {"precompute": True},
    "staggered": {"stagger": True, "factor_update_steps": 1, "inverse_update_steps": 3},
    "exact Fisher": {"fisher": "exact"},
    "reduce": {"weight_sharing": "reduce"},
    "one worker": {"grad_worker_frac": 0.5},
    "blocks": {"max_factor_dim": 34},
    "blocks of one worker": {"max_factor_dim": 34, "grad_worker_frac": 0.5, "method": "inverse"},
    "diagonals": {"max_factor_dim": 1, "precompute": True},
    "sc20": {"factor_scale": "sc20"},
    "kaisa": {"factor_scale": "kaisa"},
    "full norms": {"bn_fisher": "full", "bn_damping_multiplier": 3.0},
    "identity": {"ema_init": "identity", "factor_decay": 0.8},
    "weight decay": {"weight_decay": 0.1},
    "clipped": {"kl_clip": 1e-4},
    "accumulation": {"accumulation_steps": 2},
    "loss scale": {"grad_scaler": True},
    "skipped": {"skip_layers": ("attention",)},
    "schedules": {
        "damping": WarmupSchedule(start=1.0, target=0.01, steps=4),
        "factor_decay": MilestoneSchedule(start=0.5, factor=0.5, milestones=(2,)),
        "kl_clip": MilestoneSchedule(start=1e-3, factor=0.1, milestones=(3,)),
        "factor_update_steps": MilestoneSchedule(start=1, factor=2, milestones=(2,)),
        "inverse_update_steps": MilestoneSchedule(start=1, factor=2, milestones=(2,)),
    },
    "levenberg-marquardt": {"damping": LevenbergMarquardt(initial=0.1, interval=2)},
    "adaptive": {"refresh": "adaptive", "refresh_threshold": 0.6},
    "trust region": {"trust_region": "adaptive", "inverse_update_steps": 9},
    "gradients that shrink": {"trust_region": "adaptive", "factor_decay": 0.3, "shrinking": 0.3},
    "gradients that shrink, inverses": {"method": "inverse", "factor_decay": 0.3, "shrinking": 0.3},
    "momentum before": {"momentum": 0.5},
    "momentum before, one worker": {"momentum": 0.5, "grad_worker_frac": 0.5, "weight_decay": 0.1},
    "momentum before and an overflow": {"momentum": 0.5, "grad_scaler": True, "overflow_at": 2},
    "trust region and loss scale": {"trust_region": "adaptive", "grad_scaler": True},
}


def _train(case: str, communicator: Communicator, sharding: ShardedConfig | None) -> dict[str, Any]:
    model = Sequence()
    options = {"damping": 0.05, "inverse_update_steps": 2, **CASES[case]}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if options.pop("grad_scaler", 0) else None
    overflow_at = options.pop("overflow_at", None)
    shrinking = options.pop("shrinking", 1.0)
    behind = 0.0 if "momentum" in options else 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=behind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not apply to Embedding layers")
        kfac = KFAC(
            model,
            lr=optimizer,
            sharding=sharding,
            grad_scaler=scaler,
            process_group=communicator,
            **options,
        )
    ranks, rank = communicator.world_size, communicator.rank
    share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(0, 7, (BATCH, 5), generator=generator)[share]
        y = torch.randint(0, 3, (BATCH,), generator=generator)[share]
        optimizer.zero_grad()
        for part in (slice(0, len(x) // 2), slice(len(x) // 2, None)):
            output = model(x[part])
            if options.get("fisher") == "exact":
                kfac.sample_fisher(output)
            loss = shrinking**step * F.cross_entropy(output, y[part], reduction="sum") / BATCH
            if step == overflow_at and rank == ranks - 1:
                loss = loss * math.inf
            (loss if scaler is None else scaler.scale(loss)).backward()
        if not kfac.sums_gradients:
            for p in model.parameters():
                communicator.all_reduce(p.grad, tag="gradients").wait()
        if scaler is not None:
            scaler.unscale_(optimizer)
        due = kfac.reduction_due()
        kfac.step(num_samples=len(x), loss_scale_per_sample=1 / BATCH)
        if not kfac.updates_weights:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if due:
            kfac.adapt_damping(-0.01 * (step + 1))
        if scaler is not None:
            scaler.update()
    assert kfac.counters["skipped_steps"] == (overflow_at is not None)
    scale = 1.0 if scaler is None else scaler.get_scale()
    trust = kfac.bound.trust
    residual = 1.0 if trust is None else trust.residual
    assert (residual < 0.5) is (shrinking < 1.0)
    return {
        **model.state_dict(),
        "damping": torch.tensor(kfac.damping),
        "scale": torch.tensor(scale),
        "residual": torch.tensor(residual),
    }


def _all_cases(sharding: ShardedConfig | None) -> dict[str, dict[str, Any]]:
    return {case: _train(case, Communicator.world(), sharding) for case in CASES}


@pytest.mark.parametrize(
    "sharding",
    [None, ShardedConfig(gather="gradients"), ShardedConfig(gather="weights", v_method="padded")],
    ids=["grid", "gradients", "weights"],
)
def test_every_option_equals_one_process_on_the_grid(sharding: ShardedConfig | None) -> None:
    expected = {case: _train(case, Communicator.solo(), None) for case in CASES}
    for found in run_ranks(2, _all_cases, sharding):
        for case, values in expected.items():
            for name, value in values.items():
                torch.testing.assert_close(
                    found[case][name],
                    value,
                    **TOLERANCE,
                    msg=lambda m, case=case, name=name: f"{case}, {name}: {m}",
                )
