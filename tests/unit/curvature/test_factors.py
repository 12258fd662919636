"""Factor sums against their definitions, written out with unfold and loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elastic_kfac.curvature import factors

CONVOLUTIONS = {
    "same size": {"kernel_size": 3, "padding": 1},
    "wide padding": {"kernel_size": 3, "padding": 2},
    "no padding": {"kernel_size": 3},
    "five by five": {"kernel_size": 5, "padding": 2},
    "even kernel": {"kernel_size": 2, "padding": 1},
    "uneven kernel": {"kernel_size": (3, 5), "padding": (1, 2)},
    "one dimension": {"kernel_size": (1, 3), "padding": (0, 1)},
    "pointwise": {"kernel_size": 1},
    "pointwise stride": {"kernel_size": 1, "stride": 2},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "uneven stride": {"kernel_size": 3, "padding": 1, "stride": (1, 2)},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "replicate same": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise stride": {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    "groups pointwise": {"kernel_size": 1, "groups": 2},
}


def patches_by_gradient(inputs: torch.Tensor, module: nn.Conv2d) -> torch.Tensor:
    """Patches `[groups, n*t, a]` read off the convolution itself: the derivative of its output.

    `∂ output[o, t] / ∂ weight[o]` is the patch that output position t sees, whatever the padding.
    """
    out_per_group = module.out_channels // module.groups
    groups = []
    for group in range(module.groups):
        rows = []
        channel = group * out_per_group
        for sample in inputs:
            output = module(sample[None])[0, channel]
            for value in output.reshape(-1):
                (gradient,) = torch.autograd.grad(value, module.weight, retain_graph=True)
                rows.append(gradient[channel].reshape(-1))
        groups.append(torch.stack(rows))
    return torch.stack(groups)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_conv_input_sum_any_geometry_equals_patches(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 4, bias=False, **CONVOLUTIONS[name]).double()
    inputs = torch.randn(2, 4, 8, 9, dtype=torch.double)
    patches = patches_by_gradient(inputs, module)
    if bias:
        ones = torch.ones(*patches.shape[:2], 1, dtype=torch.double)
        patches = torch.cat((patches, ones), -1)
    expected = patches.mT @ patches
    if module.groups == 1:
        expected = expected[0]
    result = factors.conv_input_sum(inputs, module, bias=bias)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    assert factors.conv_positions(inputs, module) == patches.shape[1] // 2


def test_conv_input_sum_channels_last_equals_contiguous() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 2, 3, padding=1).double()
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.double)
    expected = factors.conv_input_sum(inputs, module, bias=True)
    other = inputs.contiguous(memory_format=torch.channels_last)
    result = factors.conv_input_sum(other, module, bias=True)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_conv_input_sum_in_pieces_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(2, 2, 3, stride=2).double()
    inputs = torch.randn(7, 2, 9, 9, dtype=torch.double)
    expected = factors.conv_input_sum(inputs, module, bias=False)
    monkeypatch.setattr(factors, "_UNFOLD_ELEMENTS", 2 * 18 * 16)
    pieces = []
    unfold = F.unfold
    monkeypatch.setattr(F, "unfold", lambda x, *a, **k: pieces.append(len(x)) or unfold(x, *a, **k))
    result = factors.conv_input_sum(inputs, module, bias=False)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert pieces == [2, 2, 2, 1]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv_output_sum_groups_equals_loops(groups: int) -> None:
    gradients = torch.randn(3, 4, 2, 5, dtype=torch.double)
    result = factors.conv_output_sum(gradients, groups)
    size = 4 // groups
    for group in range(groups):
        rows = gradients[:, group * size : (group + 1) * size].permute(0, 2, 3, 1).reshape(-1, size)
        expected = sum(torch.outer(row, row) for row in rows)
        block = result if groups == 1 else result[group]
        torch.testing.assert_close(block, expected, rtol=1e-12, atol=1e-12)


def test_linear_over_positions_equals_pointwise_convolution() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 5, 4, dtype=torch.double)  # [n, T, d]
    linear = factors.linear_input_sum(inputs, bias=True, reduce=False)
    image = inputs.transpose(1, 2).reshape(3, 4, 5, 1)
    conv = factors.conv_input_sum(image, nn.Conv2d(4, 2, 1).double(), bias=True)
    torch.testing.assert_close(linear, conv, rtol=1e-12, atol=1e-12)


def test_linear_sums_reduce_average_inputs_and_add_gradients() -> None:
    inputs = torch.randn(3, 5, 4, dtype=torch.double)
    a = factors.linear_input_sum(inputs, bias=True, reduce=True)
    rows = torch.cat((inputs.mean(1), torch.ones(3, 1, dtype=torch.double)), 1)
    torch.testing.assert_close(a, rows.t() @ rows, rtol=1e-12, atol=1e-12)
    g = factors.linear_output_sum(inputs, reduce=True)
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
    result = factors.norm_gradient_sum(normalized, gradients, bias=True, mode=mode)
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
    result = factors.linear_input_sum(rows, bias=False, reduce=False)
    assert result.dtype == torch.float32
    assert result.tolist() == [[4096, 4096], [4096, 4096]]
