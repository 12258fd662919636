from __future__ import annotations

import math

import pytest
import torch

from elastic_kfac.communication.wire_formats import (
    WIRE_FORMATS,
    Rounding,
    ScaledHalf,
    StochasticInt8,
    TopK,
    WireFormat,
    wire_format,
)
from elastic_kfac.errors import ConfigError

_SEED = Rounding(seed=1, step=2, stream=3)


def _vector(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", WIRE_FORMATS)
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_encoded_bytes_are_what_is_sent(name: str, count: int) -> None:
    wire = wire_format(name, topk_ratio=0.1)
    if name == "topk" and count == 0:
        assert wire.encoded_bytes(0) == 0
        return
    blocks = math.ceil(count / 256)
    formula = {
        "fp32": 4 * count,
        "bf16": 2 * count,
        "fp16": 2 * count + blocks,
        "int8": count + 4 * blocks,
        "topk": 8 * min(count, max(1, round(0.1 * count))),
    }[name]
    encoded = wire.encode(_vector(count), _SEED)
    assert encoded.dtype == torch.uint8
    assert encoded.numel() == wire.encoded_bytes(count) == formula
    assert wire.decode(encoded, count, torch.float64).shape == (count,)


@pytest.mark.parametrize(
    ("name", "relative"), [("fp32", 2**-24), ("bf16", 2**-8), ("fp16", 2**-11)]
)
def test_float_formats_round_to_their_precision(name: str, relative: float) -> None:
    wire = wire_format(name)
    values = _vector(5000)
    again = wire.decode(wire.encode(values, _SEED), 5000, torch.float64)
    # fp16: elements far below their block's largest are subnormal there.
    slack = 2**-39 * 8 if name == "fp16" else 0
    assert ((again - values).abs() <= relative * values.abs() + slack).all()
    assert not torch.equal(again, values)


@pytest.mark.parametrize("magnitude", [1e-25, 1e-6, 1.0, 7e4, 1e30, 3.4e38])
def test_fp16_scales_instead_of_overflowing_or_vanishing(magnitude: float) -> None:
    values = _vector(300) / _vector(300).abs().max() * magnitude
    again = ScaledHalf().decode(ScaledHalf().encode(values, _SEED), 300, torch.float64)
    error = (again - values).abs()
    assert (error <= 2**-11 * values.abs() + 2**-38 * magnitude).all()


def test_fp16_small_block_beside_a_large_one_keeps_its_precision() -> None:
    values = torch.cat([torch.full((256,), 1e9), torch.full((256,), 3e-9)])
    again = ScaledHalf().decode(ScaledHalf().encode(values, _SEED), 512, torch.float32)
    assert ((again / values - 1).abs() < 1e-3).all()


@pytest.mark.parametrize("name", WIRE_FORMATS)
def test_not_finite_elements_are_not_hidden(name: str) -> None:
    values = torch.ones(300)
    values[5], values[290] = float("nan"), float("inf")
    wire = wire_format(name, topk_ratio=0.1)
    again = wire.decode(wire.encode(values, _SEED), 300, torch.float32)
    assert not torch.isfinite(again[5])
    assert not torch.isfinite(again[290])


def test_int8_rounding_is_unbiased() -> None:
    values = _vector(400)
    wire = StochasticInt8()
    steps = 3000
    decoded = torch.stack(
        [
            wire.decode(wire.encode(values, Rounding(7, step, 0)), 400, torch.float64)
            for step in range(steps)
        ]
    )
    scale = torch.cat([part.abs().max().expand(len(part)) / 127 for part in values.split(256)])
    # A level of width s has a rounding variance of s^2 / 4 at most.
    assert ((decoded.mean(0) - values).abs() <= 5 * scale / 2 / math.sqrt(steps)).all()
    assert ((decoded - values).abs() <= scale * (1 + 1e-6)).all()
    nearest = torch.round(values / scale) * scale
    assert ((nearest - values).abs() > 5 * scale / 2 / math.sqrt(steps)).any()


def test_rounding_is_a_function_of_seed_step_stream_and_position() -> None:
    device = torch.device("cpu")
    numbers = Rounding(1, 2, 3).uniform(1000, device)
    assert torch.equal(numbers, Rounding(1, 2, 3).uniform(1000, device))
    assert torch.equal(numbers[:10], Rounding(1, 2, 3).uniform(10, device))
    for other in (Rounding(2, 2, 3), Rounding(1, 3, 3), Rounding(1, 2, 4), Rounding(2, 1, 3)):
        assert (numbers != other.uniform(1000, device)).sum() > 990


def test_rounding_numbers_are_uniform_and_uncorrelated() -> None:
    count = 200_000
    numbers = Rounding(5, 6, 7).uniform(count, torch.device("cpu")).double()
    assert numbers.min() >= 0 and numbers.max() < 1
    observed = torch.histc(numbers, bins=20, min=0, max=1)
    chi_square = ((observed - count / 20) ** 2 / (count / 20)).sum()
    assert chi_square < 50  # 19 degrees of freedom: beyond 1e-4
    centred = numbers - 0.5
    neighbours = (centred[1:] * centred[:-1]).mean() / (1 / 12)
    assert abs(neighbours) < 5 / math.sqrt(count)


def test_topk_keeps_the_largest_magnitudes() -> None:
    values = torch.tensor([0.1, -5.0, 2.0, 0.0, 3.0])
    wire = TopK(ratio=0.4)
    again = wire.decode(wire.encode(values, _SEED), 5, torch.float32)
    assert again.tolist() == [0, -5, 0, 0, 3]


def test_unknown_format_and_impossible_ratio_are_refused() -> None:
    with pytest.raises(ConfigError, match="fp32, bf16, fp16, int8, topk"):
        wire_format("fp8")
    with pytest.raises(ConfigError, match="0 < ratio"):
        wire_format("topk", topk_ratio=0.0)


def test_fp16_factors_stay_within_the_error_budget_of_the_preconditioned_gradient() -> None:
    generator = torch.Generator().manual_seed(3)

    def factor(n: int, scale: float) -> torch.Tensor:
        rows = torch.randn(400, n, generator=generator, dtype=torch.float64)
        return rows.t() @ rows / 400 * scale

    a, g = factor(60, 30.0), factor(40, 1e-6)
    gradient = torch.randn(40, 60, generator=generator, dtype=torch.float64)

    def precondition(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        values_a, vectors_a = torch.linalg.eigh(a)
        values_g, vectors_g = torch.linalg.eigh(g)
        inner = vectors_g.t() @ gradient @ vectors_a
        inner = inner / (values_g.clamp(min=0)[:, None] * values_a.clamp(min=0) + 1e-7)
        return vectors_g @ inner @ vectors_a.t()

    wire = ScaledHalf()
    sent = []
    for matrix in (a, g):
        row, column = torch.tril_indices(*matrix.shape)
        packed = matrix[row, column]
        received = wire.decode(wire.encode(packed, _SEED), packed.numel(), torch.float64)
        again = torch.zeros_like(matrix)
        again[row, column] = received
        sent.append(again + again.tril(-1).t())
    exact = precondition(a, g)
    error = (precondition(sent[0], sent[1]) - exact).norm() / exact.norm()
    assert 0 < error <= 1e-2


def _descend(wire: WireFormat, error_feedback: bool, lr: float, shift: float, seed: int) -> float:
    """Final loss of gradient descent on a quadratic, two ranks with opposite gradient offsets."""
    count = 100
    generator = torch.Generator().manual_seed(seed)
    curvature = torch.logspace(-2, 0, count, dtype=torch.float64)
    goal = torch.randn(count, generator=generator, dtype=torch.float64)
    offset = torch.randn(count, generator=generator, dtype=torch.float64) * shift
    theta = torch.zeros(count, dtype=torch.float64)
    residuals = [torch.zeros_like(theta) for _ in range(2)]
    for step in range(200):
        total = torch.zeros_like(theta)
        for rank, residual in enumerate(residuals):
            gradient = curvature * (theta - goal) / 2 + (offset if rank else -offset)
            if error_feedback:
                gradient = gradient + residual
            sent = wire.decode(wire.encode(gradient, Rounding(0, step, rank)), count, torch.float64)
            if error_feedback:
                residuals[rank] = gradient - sent
            total += sent
        theta -= lr * total
    return float((curvature * (theta - goal) ** 2).sum())


@pytest.mark.parametrize(
    ("wire", "lr", "shift"), [(StochasticInt8(), 0.3, 30.0), (TopK(0.1), 0.1, 0.3)]
)
def test_error_feedback_lowers_the_loss(wire: WireFormat, lr: float, shift: float) -> None:
    with_feedback = sum(_descend(wire, True, lr, shift, seed) for seed in range(3))
    without = sum(_descend(wire, False, lr, shift, seed) for seed in range(3))
    assert with_feedback < 0.5 * without
