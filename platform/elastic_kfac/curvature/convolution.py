"""Convolutions and transposed convolutions of one to three dimensions as Kronecker products A ⊗ G.

Grosse and Martens 2016: output positions share the weight, and their gradients are taken for
uncorrelated, so that A sums over patches and G averages over positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.kronecker import KroneckerLayer
from elastic_kfac.curvature.patches import (
    conv_input_sum,
    conv_output_sum,
    conv_positions,
    conv_weight_gradient,
    transposed_input_sum,
    transposed_weight_gradient,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ConvLayer(KroneckerLayer):
    """nn.Conv1d, 2d or 3d on `[n, channels, ...]`."""

    many_positions = True
    module: _ConvNd

    def __init__(
        self,
        name: str,
        module: _ConvNd,
        options: KfacOptions,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
    ) -> None:
        self.groups = module.groups
        self._offsets = math.prod(module.kernel_size)
        self._unbatched_dims = 1 + len(module.kernel_size)
        super().__init__(name, module, options, weight, bias)

    def weight_gradient(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        return conv_weight_gradient(inputs, gradients, self.module)

    def _count_rows(self, inputs: Tensor) -> int:
        return inputs.shape[0] * conv_positions(inputs, self.module)

    def _input_sum(self, inputs: Tensor) -> Tensor:
        return conv_input_sum(inputs, self.module, bias=self.bias is not None, side=self.sides["A"])

    def output_rows(self, gradients: Tensor) -> int:
        return gradients.shape[0] * gradients.shape[2:].numel()

    def output_sum(self, gradients: Tensor, kept: Tensor | None) -> Tensor:
        return conv_output_sum(gradients, self.groups, self.sides["G"])

    def normalizers(self, samples: float, rows: float) -> dict[str, float]:
        spatial = (rows / samples) ** 2
        if self.options.factor_scale == "sc20":
            return {"A": samples * spatial, "G": rows / spatial}
        if self.options.factor_scale == "kaisa":
            return {"A": rows * spatial, "G": rows * spatial}
        return super().normalizers(samples, rows)


class ConvTransposeLayer(ConvLayer):
    """nn.ConvTranspose1d, 2d or 3d, as what it is: a convolution of its input with zeros between pixels.

    The approximation is Grosse and Martens' (2016) for that convolution, with output pixels as
    positions, so that a bias is a coordinate of the input as everywhere. (Input pixels as positions
    would give A `[in, in]` and G over the unfolded output gradient, without a place for the bias.)
    """

    module: _ConvTransposeNd

    def _dimensions(self, weight_shape: torch.Size) -> tuple[int, int]:
        return weight_shape[1], weight_shape[0] // self.groups * weight_shape[2:].numel()

    def _swapped(self, value: Tensor, first: int) -> Tensor:
        """`[groups, first, second, k]`, flat, with the channels in the other order."""
        return value.reshape(self.groups, first, -1, *self.module.kernel_size).transpose(1, 2)

    def _to_matrix(self, weight: Tensor) -> Tensor:
        inputs = self.module.in_channels // self.groups
        return super()._to_matrix(self._swapped(weight, inputs))

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        return self._swapped(matrix, self.g_dim)

    def weight_gradient(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        return transposed_weight_gradient(inputs, gradients, self.module)

    def _input_sum(self, inputs: Tensor) -> Tensor:
        return transposed_input_sum(
            inputs, self.module, bias=self.bias is not None, side=self.sides["A"]
        )
