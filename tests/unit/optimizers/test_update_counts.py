"""Published update counts and costs, and the convergence theorem against exact and simulated runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from elastic_kfac.optimizers.batch_size import make_policy
from support.update_counts import (
    delivered_updates,
    expected_gap_bounds,
    fixed_batch_updates,
    growing_batch_updates,
    largest_base_rate,
    stages,
)

IMAGENET = 1_281_167
ROOT = Path(__file__).parents[3]


def gg_updates(
    num_samples: int,
    epochs: int,
    batch: int,
    decay: tuple[int, ...],
    factor: float,
    base: int = 128,
) -> int:
    policy = make_policy(
        "gg",
        base_batch_size=base,
        max_batch_size=batch,
        decay_epochs=decay,
        decay_factor=factor,
    )
    return growing_batch_updates(stages(policy, epochs), num_samples, base)


@pytest.mark.parametrize(
    ("batch", "bl", "gg"),
    [
        (640, 7031, 16380),
        (3200, 1406, 14508),
        (5120, 878, 14449),
        (10240, 439, 14400),
        (16000, 281, 14383),
    ],
)
def test_resnet18_cifar10_counts_are_the_published_ones(batch: int, bl: int, gg: int) -> None:
    assert fixed_batch_updates(50_000, 90, batch) == bl
    assert gg_updates(50_000, 90, batch, (30, 60, 80), 0.2) == gg


@pytest.mark.parametrize(
    ("batch", "gg"),
    [
        (256, 50700),
        (512, 37050),
        (1024, 31980),
        (2048, 30030),
        (4096, 29191),
        (8192, 28947),
        (16384, 28828),
    ],
)
def test_squeezenext_cifar10_counts_are_the_published_ones(batch: int, gg: int) -> None:
    assert gg_updates(50_000, 200, batch, (60, 120, 160), 0.2) == gg


def test_remaining_published_counts() -> None:
    assert fixed_batch_updates(50_000, 90, 128) == 35156
    assert fixed_batch_updates(50_000, 200, 128) == 78125
    assert fixed_batch_updates(50_000, 200, 16384) == 610
    assert gg_updates(100_000, 120, 256, (60, 90), 0.1) == 70290
    assert gg_updates(100_000, 120, 16384, (60, 90), 0.1) == pytest.approx(48995, rel=0.01)
    assert gg_updates(IMAGENET, 90, 16384 * 4, (30, 60), 0.1, base=256) == pytest.approx(
        166_700, rel=1e-3
    )
    assert fixed_batch_updates(IMAGENET, 90, 256) == pytest.approx(450_000, rel=1e-3)


def test_the_command_prints_the_published_cost_table() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/cost_table.py")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    rows = {row["schedule"]: row["model_s"] for row in json.loads(done.stdout)}
    published = {"BL": 16_666, "GG": 6_150, "ABS": 2_666, "ABSA": 3_467}
    assert rows == pytest.approx(published, rel=0.005)
    text = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert [line.split()[0] for line in text.splitlines()[1:]] == list(published)


def test_delivered_updates_count_the_incomplete_last_batch() -> None:
    policy = make_policy("gg", base_batch_size=10, max_batch_size=40, decay_epochs=(2,))
    assert stages(policy, 5) == [(10, 2), (40, 3)]
    expected = sum(math.ceil(95 / b) for b in (10, 10, 40, 40, 40))
    assert delivered_updates([(10, 2), (40, 3)], 95) == expected


def test_theorem_bounds_the_loss_of_noisy_quadratic_descent() -> None:
    """H = diag(h), single-sample gradient noise of variance M + M_v‖∇L‖², batches 1, 4, 16, 64."""
    curvature = torch.linspace(0.5, 4.0, 8, dtype=torch.float64)
    smoothness, convexity = 4.0, 0.5
    noise, noise_growth = 2.0, 1.5
    batches = [b for b in (1, 4, 16, 64) for _ in range(60)]
    rate = largest_base_rate(smoothness, noise_growth, max(batches))
    runs = 4000
    generator = torch.Generator().manual_seed(0)
    theta = torch.full((runs, 8), 1.5, dtype=torch.float64)
    gap = float(0.5 * (curvature * theta[0].square()).sum())
    bounds = list(
        expected_gap_bounds(
            batches,
            base_rate=rate,
            smoothness=smoothness,
            convexity=convexity,
            noise=noise,
            initial_gap=gap,
        )
    )
    floor = rate * smoothness * noise / (2 * convexity)
    ratios = []
    for batch, bound in zip(batches, bounds, strict=True):
        gradient = curvature * theta
        variance = (noise + noise_growth * gradient.square().sum(1, keepdim=True)) / (8 * batch)
        draws = torch.randn(runs, 8, dtype=torch.float64, generator=generator)
        theta = theta - batch * rate * (gradient + variance.sqrt() * draws)
        loss = 0.5 * (curvature * theta.square()).sum(1)
        mean, error = float(loss.mean()), float(loss.std()) / runs**0.5
        assert mean - 4 * error <= bound
        ratios.append(mean / bound)
    # The bound is about this process: it falls with it and is not far above its floor at the end.
    assert bounds[-1] < gap / 50
    assert bounds[-1] == pytest.approx(floor, rel=0.05)
    assert max(ratios[60:]) > 0.05


def test_theorem_is_violated_by_a_rate_above_its_condition() -> None:
    """What the oracle test above would miss if the bound were merely huge."""
    smoothness = convexity = 1.0
    rate = 3 * largest_base_rate(smoothness, 0.0, 16)
    gap, noise = 0.5, 1e-3
    bounds = expected_gap_bounds(
        [16] * 10,
        base_rate=rate,
        smoothness=smoothness,
        convexity=convexity,
        noise=noise,
        initial_gap=gap,
    )
    exact, violated = gap, False
    for bound in bounds:
        exact = (1 - 16 * rate) ** 2 * exact + 16 * rate**2 * noise / 2
        violated |= exact > bound
    assert violated
