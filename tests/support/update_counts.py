"""How many updates a batch-size policy takes, and where they provably lead.

The published tables count updates with a data loader that drops the last incomplete micro-batch of
an epoch; this platform delivers every sample. Both counts are here, under different names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from elastic_kfac.optimizers.batch_size import BatchSizePolicy


def stages(policy: BatchSizePolicy, epochs: int) -> list[tuple[int, int]]:
    """(batch size, epochs) of each stretch of whole epochs with one batch, for policies that are
    functions of the epoch alone."""
    result: list[tuple[int, int]] = []
    for epoch in range(epochs):
        batch = policy.at(epoch).batch_size
        if result and result[-1][0] == batch:
            result[-1] = (batch, result[-1][1] + 1)
        else:
            result.append((batch, 1))
    return result


def fixed_batch_updates(num_samples: int, epochs: int, batch_size: int) -> int:
    """Published count of BL and FB: ⌊E·n/B⌋."""
    return epochs * num_samples // batch_size


def growing_batch_updates(
    batch_stages: Sequence[tuple[int, int]], num_samples: int, micro_batch_size: int
) -> int:
    """Published count of GG: ⌊Σ ⌊n/b0⌋·epochs·b0/b⌋ over its stages.

    A step of batch b is b/b0 accumulated micro-batches, of which an epoch has ⌊n/b0⌋.
    """
    micro_batches = num_samples // micro_batch_size
    total = sum(
        (
            Fraction(micro_batches * epochs * micro_batch_size, batch)
            for batch, epochs in batch_stages
        ),
        Fraction(0),
    )
    return math.floor(total)


def delivered_updates(batch_stages: Sequence[tuple[int, int]], num_samples: int) -> int:
    """Steps of this platform: every sample of every epoch, no batch crossing an epoch."""
    return sum(epochs * -(-num_samples // batch) for batch, epochs in batch_stages)


def largest_base_rate(smoothness: float, noise_growth: float, max_batch_size: int) -> float:
    """η0 ≤ 1 / (L_g (M_v + B_max)): the condition of the convergence theorem."""
    return 1.0 / (smoothness * (noise_growth + max_batch_size))


def expected_gap_bounds(
    batch_sizes: Sequence[int],
    *,
    base_rate: float,
    smoothness: float,
    convexity: float,
    noise: float,
    initial_gap: float,
) -> Iterator[float]:
    """Upper bounds on E[L(θ_{t+1})] − L* for t = 0, 1, … with steps b_t·η0 (Yao et al. 2018).

    Π_{k=1..t} (1 − b_k η0 c_s)·(gap_0 − floor) + floor, with floor = η0 L_g M / (2 c_s). The product
    begins at k = 1 as published, which is valid but slightly loose.

    Args:
        batch_sizes: b_0, b_1, …
        base_rate: η0, at most `largest_base_rate`.
        smoothness: L_g.
        convexity: c_s of strong convexity.
        noise: M; a single sample's gradient variance is at most M + M_v‖∇L‖².
        initial_gap: L(θ_0) − L*, at least the floor.
    """
    floor = base_rate * smoothness * noise / (2 * convexity)
    product = 1.0
    for step, batch in enumerate(batch_sizes):
        if step:
            product *= 1 - batch * base_rate * convexity
        yield product * (initial_gap - floor) + floor
