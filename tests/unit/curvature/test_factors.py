"""Factor sums against their definitions, written out with loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elastic_kfac import host
from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature import factors
from elastic_kfac.curvature.kronecker import LinearLayer
from elastic_kfac.curvature.sides import Whole, multiplied


def test_linear_sums_reduce_average_inputs_and_add_gradients() -> None:
    inputs = torch.randn(3, 5, 4, dtype=torch.double)
    module = nn.Linear(4, 4).double()
    options = KfacOptions(weight_sharing="reduce")
    layer = LinearLayer("", module, options, module.weight, module.bias)
    a = layer.observe(inputs, frozenset("A")).input_sum
    rows = torch.cat((inputs.mean(1), torch.ones(3, 1, dtype=torch.double)), 1)
    torch.testing.assert_close(a, rows.t() @ rows, rtol=1e-12, atol=1e-12)
    g = layer.output_sum(inputs, None)
    rows = inputs.sum(1)
    torch.testing.assert_close(g, rows.t() @ rows, rtol=1e-12, atol=1e-12)


def test_embedding_input_sum_counts_tokens_without_padding() -> None:
    indices = torch.tensor([[0, 2, 2], [4, 0, 1]])
    assert factors.embedding_input_sum(indices, 6, None).tolist() == [2, 1, 2, 0, 1, 0]
    assert factors.embedding_input_sum(indices, 6, 0).tolist() == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("mode", ["unit", "full", "diag"])
def test_norm_gradient_sum_modes_equal_per_sample_gradients(mode: str) -> None:
    torch.manual_seed(0)
    n, positions, features = 4, 6, 3
    normalized = torch.randn(n, positions, features, dtype=torch.double)
    gradients = torch.randn(n, positions, features, dtype=torch.double)
    result = factors.norm_moments(
        factors.norm_gradients(normalized, gradients, bias=True, mode=mode), mode=mode
    )
    rows = torch.cat(((gradients * normalized).sum(1), gradients.sum(1)), 1)
    full = rows.t() @ rows
    if mode == "full":
        expected = full
    elif mode == "diag":
        expected = full.diagonal()
    else:
        index = [torch.tensor([c, c + features]) for c in range(features)]
        expected = torch.stack([full[i][:, i] for i in index])
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_accumulate_in_float32(dtype: torch.dtype) -> None:
    # 4096 ones plus small values: a half-precision sum would stop growing at 2048 or 256.
    rows = torch.ones(4096, 2, dtype=dtype)
    result = factors.linear_input_sum(rows, bias=False)
    assert result.dtype == torch.float32
    assert result.tolist() == [[4096, 4096], [4096, 4096]]


@pytest.mark.parametrize("width", [256, 257, 785, 1024])
def test_gram_matrices_by_halves_are_the_sum_of_outer_products(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, width, dtype=torch.float64, generator=generator)
    found = factors.linear_output_sum(rows)
    brute_force = torch.einsum("ni,nj->ij", rows, rows)
    assert torch.allclose(found, brute_force, rtol=1e-12, atol=1e-10)
    half = width // 2
    assert torch.equal(found[half:, :half], found[:half, half:].mT)
    groups = Whole(width).gram(torch.stack([rows.mT, 2 * rows.mT]))
    wanted = torch.stack([brute_force, 4 * brute_force])
    assert torch.allclose(groups, wanted, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("count", [40, 600])  # below and above what is computed by halves
@pytest.mark.parametrize("bias_at", [None, 300])  # 300: the first bias of two uses of a weight
def test_inputs_with_a_bias_are_summed_into_one_matrix(bias_at: int | None, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 300, dtype=torch.float64, generator=generator, requires_grad=True)
    side = Whole(301 if bias_at is None else 302, bias_at=bias_at)
    with torch.no_grad():
        found = factors.linear_input_sum(x, bias=True, side=side)
        more = [x.new_ones(count, 1)] + [x.new_zeros(count, 1)] * (side.width - 301)
        wide = torch.cat([x, *more], 1)
    brute_force = torch.einsum("ni,nj->ij", wide, wide)
    assert torch.allclose(found, brute_force, rtol=1e-12, atol=1e-10)
    assert found.is_contiguous()


@pytest.mark.parametrize("processor", ["AMD EPYC", "Intel(R) Xeon(R) Processor"])
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(600, 601, 603), (640, 640, 513), (512, 1025, 400)]
)
def test_large_products_of_odd_sides_are_those_of_rows_and_columns(
    rows: int, inner: int, outer: int, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "processor_name", lambda: processor)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, rows, inner, dtype=torch.float64, generator=generator)
    b = torch.randn(outer, inner, dtype=torch.float64, generator=generator).mT
    found = multiplied(a, b)
    assert found.is_contiguous()
    assert torch.allclose(found, torch.einsum("bik,kj->bij", a, b), rtol=1e-12, atol=1e-10)
