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
    conv_lengths,
    conv_mean_patches,
    conv_output_sum,
    conv_weight_gradient,
    transposed_input_sum,
    transposed_mean_patches,
    transposed_weight_gradient,
)
from elastic_kfac.curvature.sides import Side

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

    @property
    def _positions(self) -> Tensor | None:
        """Output positions `[n, ...]` that count; None for all: a mask of other dimensions is not about
        this layer."""
        real = self._real
        return real if real is not None and real.dim() == self._unbatched_dims else None

    def misfit(self, inputs: Tensor) -> str:
        real = self._positions
        if real is None:
            return ""
        found, masked = conv_lengths(inputs, self.module), tuple(real.shape[1:])
        if found == masked and not self.module.transposed:
            return ""
        return (
            f"which of its {_words(found)} output positions are real does not follow from a mask of "
            f"{_words(masked)}"
        )

    def _samples(self, tensor: Tensor) -> Tensor:
        """The samples that count."""
        real = self._real
        return tensor if real is None or real.dim() > 1 else tensor[real]

    def _masked(self, gradients: Tensor) -> Tensor:
        real, gradients = self._positions, self._samples(gradients)
        if real is None or real.shape[1:] != gradients.shape[2:]:
            return gradients
        return gradients * real.unsqueeze(1).to(gradients.dtype)

    def weight_gradient(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        return conv_weight_gradient(self._samples(inputs), self._masked(gradients), self.module)

    def _count_rows(self, inputs: Tensor) -> int:
        return self._rows_of(inputs.shape[0], conv_lengths(inputs, self.module))

    def output_rows(self, gradients: Tensor) -> int:
        return self._rows_of(gradients.shape[0], tuple(gradients.shape[2:]))

    def _rows_of(self, samples: int, lengths: tuple[int, ...]) -> int:
        real = self._positions
        if real is not None and tuple(real.shape[1:]) == lengths:
            return int((real.flatten(1).any(1) if self.reduces else real).sum())
        if self._real is not None and self._real.dim() == 1:
            samples = int(self._real.sum())
        return samples if self.reduces else samples * math.prod(lengths)

    def _input_sum(self, inputs: Tensor) -> Tensor:
        inputs, bias, side = self._samples(inputs), self.bias is not None, self.sides["A"]
        real = None if self.misfit(inputs) else self._positions
        if not self.reduces:
            return self._patch_sum(inputs, real, bias, side)
        rows = self._mean_patches(inputs, real)
        rows = rows if self.groups > 1 else rows[0]
        core = side.gram(rows)
        return side.bordered(core, rows.sum(-1), rows.shape[-1]) if bias else core

    def _patch_sum(self, inputs: Tensor, real: Tensor | None, bias: bool, side: Side) -> Tensor:
        return conv_input_sum(inputs, self.module, bias=bias, side=side, real=real)

    def _mean_patches(self, inputs: Tensor, real: Tensor | None) -> Tensor:
        """A sample's mean over its positions, `[groups, a, n]`."""
        return conv_mean_patches(inputs, self.module, real)

    def output_sum(self, gradients: Tensor, kept: Tensor | None) -> Tensor:
        gradients = self._masked(gradients)
        if self.reduces:
            gradients = gradients.to(self.dtype).flatten(2).sum(-1, keepdim=True)
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
        inputs, gradients = self._samples(inputs), self._samples(gradients)
        return transposed_weight_gradient(inputs, gradients, self.module)

    def _patch_sum(self, inputs: Tensor, real: Tensor | None, bias: bool, side: Side) -> Tensor:
        return transposed_input_sum(inputs, self.module, bias=bias, side=side)

    def _mean_patches(self, inputs: Tensor, real: Tensor | None) -> Tensor:
        return transposed_mean_patches(inputs, self.module)


def _words(lengths: tuple[int, ...]) -> str:
    return " x ".join(map(str, lengths))
