"""Sums of convolutions against patches that torch's own convolutions hand out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_kfac.curvature import factors, patches

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


KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

OTHER_DIMENSIONS = [
    (dims, options)
    for dims in (1, 3)
    for options in (
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 2},
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 4, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": "valid", "groups": 2},
        {"kernel_size": 2, "padding": 1, "groups": 4, "stride": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": "same", "padding_mode": "replicate", "stride": 1},
        {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    )
] + [
    (1, {"kernel_size": 5, "padding": 2}),
    (3, {"kernel_size": (1, 3, 2), "padding": (0, 2, 1), "stride": (2, 1, 3)}),
    (3, {"kernel_size": (3, 1, 2), "dilation": (1, 2, 3)}),
]

TRANSPOSED_OPTIONS = [
    (dims, options)
    for dims in (1, 2, 3)
    for options in (
        {"kernel_size": 3},
        {"kernel_size": 1, "stride": 2, "output_padding": 1},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 3, "stride": 3, "padding": 1, "dilation": 2, "groups": 2},
        {"kernel_size": 2, "stride": 4, "dilation": 2, "groups": 4, "output_padding": 3},
    )
] + [
    (2, {"kernel_size": (3, 2), "stride": (1, 3), "padding": (2, 0), "dilation": (2, 1)}),
    (3, {"kernel_size": (1, 2, 3), "stride": (2, 3, 1), "output_padding": (1, 2, 0)}),
]


def patches_of(inputs: Tensor, module: Any) -> Tensor:
    """Patches `[groups, n*t, a]`: what the same convolution computes with every weight of one entry."""
    groups, kernel = module.groups, module.kernel_size
    a = module.in_channels // groups * math.prod(kernel)
    options = {n: getattr(module, n) for n in ("stride", "padding", "dilation", "padding_mode")}
    if module.transposed:
        options["output_padding"] = module.output_padding
    probe = type(module)(
        module.in_channels, groups * a, kernel, groups=groups, bias=False, **options
    ).double()
    entries = torch.eye(a, dtype=torch.double).view(a, -1, *kernel)
    with torch.no_grad():
        if module.transposed:  # [in, out / groups, ...]
            probe.weight.copy_(entries.transpose(0, 1).repeat(groups, *[1] * (len(kernel) + 1)))
        else:
            probe.weight.copy_(entries.repeat(groups, *[1] * (len(kernel) + 1)))
        return probe(inputs).unflatten(1, (groups, a)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)


def assert_sums(inputs: Tensor, module: Any, *, bias: bool) -> None:
    rows = patches_of(inputs, module)
    assert math.prod(patches.conv_lengths(inputs, module)) * len(inputs) == rows.shape[1]
    if bias:
        rows = torch.cat((rows, torch.ones(*rows.shape[:2], 1, dtype=torch.double)), -1)
    expected = rows.mT @ rows
    if module.groups == 1:
        expected = expected[0]
    sums = patches.transposed_input_sum if module.transposed else patches.conv_input_sum
    result = sums(inputs, module, bias=bias)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_conv_input_sum_any_geometry_equals_patches(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 4, bias=False, **CONVOLUTIONS[name]).double()
    assert_sums(torch.randn(2, 4, 8, 9, dtype=torch.double), module, bias=bias)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("dims", "options"), OTHER_DIMENSIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_conv_input_sum_in_one_and_three_dimensions(
    dims: int, options: dict[str, Any], bias: bool
) -> None:
    torch.manual_seed(0)
    module = KINDS[dims](4, 4, bias=False, **options).double()
    assert_sums(torch.randn(2, 4, *(7, 9, 8)[:dims], dtype=torch.double), module, bias=bias)


@pytest.mark.parametrize(("dims", "options"), TRANSPOSED_OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_transposed_input_sum_equals_patches(
    dims: int, options: dict[str, Any], bias: bool
) -> None:
    torch.manual_seed(0)
    module = TRANSPOSED[dims](4, 4, bias=False, **options).double()
    assert_sums(torch.randn(2, 4, *(3, 4, 2)[:dims], dtype=torch.double), module, bias=bias)


def test_transposed_input_sum_every_small_geometry() -> None:
    """All of them in one dimension: the phases of a dimension do not depend on the others."""
    torch.manual_seed(0)
    seen = 0
    for length, k, s, p, d in itertools.product((1, 3), (1, 2, 4), (1, 2, 3), (0, 1, 2), (1, 2)):
        for further in range(max(s, d)):
            if (length - 1) * s - 2 * p + d * (k - 1) + further + 1 < 1:
                continue
            options = {"stride": s, "padding": p, "dilation": d, "output_padding": further}
            module = nn.ConvTranspose1d(1, 1, k, bias=False, **options).double()
            assert_sums(torch.randn(2, 1, length, dtype=torch.double), module, bias=True)
            seen += 1
    assert seen > 100


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("dims", "options", "kinds"),
    [(*case, KINDS) for case in OTHER_DIMENSIONS]
    + [(*case, TRANSPOSED) for case in TRANSPOSED_OPTIONS],
)
def test_weight_gradients_are_those_of_autograd(
    dims: int, options: dict[str, Any], kinds: dict[int, Any]
) -> None:
    torch.manual_seed(0)
    module = kinds[dims](4, 4, **options).double()
    inputs = torch.randn(2, 4, *(7, 9, 8)[:dims], dtype=torch.double)
    output = module(inputs)
    gradients = torch.randn_like(output)
    output.backward(gradients)
    function = (
        patches.transposed_weight_gradient if module.transposed else patches.conv_weight_gradient
    )
    result = function(inputs, gradients, module)
    torch.testing.assert_close(result, module.weight.grad, rtol=1e-10, atol=1e-10)


def test_conv_input_sum_channels_last_equals_contiguous() -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 2, 3, padding=1).double()
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.double)
    expected = patches.conv_input_sum(inputs, module, bias=True)
    other = inputs.contiguous(memory_format=torch.channels_last)
    result = patches.conv_input_sum(other, module, bias=True)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(2 * 18 * 16, [(2, 4), (2, 4), (2, 4), (1, 4)]), (18 * 12, [(1, 3), (1, 1)] * 7)],
)
def test_conv_input_sum_in_pieces_equals_whole(
    monkeypatch: pytest.MonkeyPatch, limit: int, sizes: list[tuple[int, int]]
) -> None:
    module = nn.Conv2d(2, 2, 3, stride=2).double()
    inputs = torch.randn(7, 2, 9, 9, dtype=torch.double)
    expected = patches.conv_input_sum(inputs, module, bias=False)
    monkeypatch.setattr(patches, "_PATCH_ELEMENTS", limit)
    pieces = []
    rows = patches._patch_rows
    monkeypatch.setattr(
        patches,
        "_patch_rows",
        lambda view, g: pieces.append(tuple(view.shape[::2][:2])) or rows(view, g),
    )
    result = patches.conv_input_sum(inputs, module, bias=False)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert pieces == sizes


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv_output_sum_groups_equals_loops(groups: int) -> None:
    gradients = torch.randn(3, 4, 2, 5, dtype=torch.double)
    result = patches.conv_output_sum(gradients, groups)
    size = 4 // groups
    for group in range(groups):
        rows = gradients[:, group * size : (group + 1) * size].permute(0, 2, 3, 1).reshape(-1, size)
        expected = sum(torch.outer(row, row) for row in rows)
        block = result if groups == 1 else result[group]
        torch.testing.assert_close(block, expected, rtol=1e-12, atol=1e-12)


def test_linear_over_positions_equals_pointwise_convolution() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 5, 4, dtype=torch.double)  # [n, T, d]
    linear = factors.linear_input_sum(inputs, bias=True)
    image = inputs.transpose(1, 2).reshape(3, 4, 5, 1)
    conv = patches.conv_input_sum(image, nn.Conv2d(4, 2, 1).double(), bias=True)
    torch.testing.assert_close(linear, conv, rtol=1e-12, atol=1e-12)
