"""Normalisation layers: the Fisher of scale and shift, per channel, whole, or its diagonal."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature import inverses
from elastic_kfac.curvature.damping import least_damping, typical_eigenvalue
from elastic_kfac.curvature.factors import norm_gradients, norm_moments
from elastic_kfac.curvature.layer import Layer, Observation, Shape, Shapes

_OVER_SHAPE = (nn.LayerNorm, nn.RMSNorm)
"""Those that normalise over the last dimensions and scale each of their elements."""

NORMS = (*_OVER_SHAPE, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class NormLayer(Layer):
    """Scale and shift of a module of `NORMS`; `mode` is the structure of F (see `norm_moments`)."""

    factor_names = ("F",)
    guarded = True
    adds_calls = True
    mode: ClassVar[str]
    _shared: tuple[Tensor, Tensor] | None = None
    """(mean, 1/σ) that a call of synchronised batch norm normalised with."""

    def __init__(self, name: str, module: nn.Module, options: KfacOptions) -> None:
        super().__init__(name, module, options)
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        assert isinstance(weight, nn.Parameter)
        self._parameters: tuple[nn.Parameter, ...] = (weight,)
        if isinstance(bias, nn.Parameter) and bias.requires_grad:
            self._parameters = (weight, bias)
        self.features = weight.numel()
        is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        self._damping_factor = options.bn_damping_multiplier if is_batch_norm else 1.0

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return self._parameters

    @property
    def decomposition_shapes(self) -> Shapes:
        return {"F_inverse": self.factor_shapes["F"]}

    @property
    def gradient_shape(self) -> Shape:
        return (self.features * len(self._parameters),)

    @property
    def _unbatched_dims(self) -> int:  # type: ignore[override]
        return len(self.module.normalized_shape) if isinstance(self.module, _OVER_SHAPE) else 1

    def _leading_dims(self, tensor: Tensor) -> int:
        return super()._leading_dims(tensor) if isinstance(self.module, _OVER_SHAPE) else 1

    def weight_gradient(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        normalized, gradients = self._by_channel(inputs, gradients)
        return (normalized * gradients).sum((0, 1)).reshape(self._parameters[0].shape)

    def _by_channel(self, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """x̂ and the output gradients as `[n, positions, features]`."""
        normalized = normalize(self.module, inputs.to(self.dtype), self._shared)
        if isinstance(self.module, _OVER_SHAPE):
            positions = gradients.shape[1 : gradients.dim() - len(self.module.normalized_shape)]
            shape = (gradients.shape[0], positions.numel(), self.features)
            return normalized.reshape(shape), gradients.reshape(shape)
        return _channels_last(normalized), _channels_last(gradients)

    def note(self) -> tuple[Tensor, Tensor] | None:
        # Of more than its own inputs, and other ones at the next call.
        return getattr(self.module, "shared_statistics", None)

    def noting(self, note: Any) -> Self:
        twin = copy.copy(self)
        twin._shared = note
        return twin

    def observe(self, inputs: Tensor, due: frozenset[str]) -> Observation:
        return Observation(inputs.shape[0], kept=inputs)

    def output_rows(self, gradients: Tensor) -> int:
        return gradients.shape[0]

    def output_sum(self, gradients: Tensor, kept: Tensor | None) -> Tensor:
        assert kept is not None
        normalized, gradients = self._by_channel(kept, gradients)
        bias = len(self._parameters) == 2
        return norm_gradients(normalized, gradients, bias=bias, mode=self.mode)

    def squared(self, sums: Tensor) -> Tensor:
        return norm_moments(sums, mode=self.mode)

    def normalizers(self, samples: float, rows: float) -> dict[str, float]:
        return {"F": samples}

    def decompose(
        self,
        factors: Mapping[str, Tensor],
        names: tuple[str, ...],
        damping: float,
        last: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        return {"F_inverse": self._inverse(factors["F"], damping * self._damping_factor)}

    @abstractmethod
    def _inverse(self, fisher: Tensor, damping: float) -> Tensor: ...

    def precondition(
        self,
        decomposition: Mapping[str, Tensor],
        gradient: Tensor,
        damping: float,
        used: Tensor | None = None,
    ) -> Tensor:
        return self._product(decomposition["F_inverse"], gradient)

    @abstractmethod
    def _product(self, inverse: Tensor, gradient: Tensor) -> Tensor: ...

    def gradient(self, weight_decay: float = 0.0, used: Tensor | None = None) -> Tensor:
        return torch.cat(self._gradients())

    def _gradients(self) -> list[Tensor]:
        grads = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            grads.append(parameter.grad.to(self.dtype).reshape(-1))
        return grads

    def set_gradient(self, value: Tensor, used: Tensor | None = None) -> None:
        self._write(value.split(self.features))

    def _write(self, parts: tuple[Tensor, ...]) -> None:
        for parameter, part in zip(self._parameters, parts, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(part.reshape(parameter.grad.shape))


class UnitNorm(NormLayer):
    """One 2x2 block of (scale, shift) per channel (Osawa et al. 2019)."""

    mode = "unit"

    @property
    def kept(self) -> str:
        return "F: a block per channel" if self.options.bn_fisher == "full" else ""

    @property
    def factor_shapes(self) -> Shapes:
        return {"F": (self.features, len(self._parameters), len(self._parameters))}

    @property
    def gradient_shape(self) -> Shape:
        return (self.features, len(self._parameters))

    def _inverse(self, fisher: Tensor, damping: float) -> Tensor:
        if fisher.shape[-1] == 2:
            trace = fisher.diagonal(dim1=-2, dim2=-1).sum(-1)
            least = least_damping(trace, fisher.dtype)
            return inverses.two_by_two_inverse(fisher, least.double().clamp(min=damping))
        return inverses.damped_inverse(fisher, damping)

    def _product(self, inverse: Tensor, gradient: Tensor) -> Tensor:
        return (inverse @ gradient.unsqueeze(-1)).squeeze(-1)

    def gradient(self, weight_decay: float = 0.0, used: Tensor | None = None) -> Tensor:
        return torch.stack(self._gradients(), -1)

    def set_gradient(self, value: Tensor, used: Tensor | None = None) -> None:
        self._write(value.unbind(-1))


class FullNorm(NormLayer):
    """The whole matrix over all scales, then all shifts."""

    mode = "full"

    @property
    def factor_shapes(self) -> Shapes:
        return {"F": self.gradient_shape * 2}

    def _inverse(self, fisher: Tensor, damping: float) -> Tensor:
        least = least_damping(typical_eigenvalue(fisher), fisher.dtype)
        return inverses.damped_inverse(fisher, least.clamp(min=damping))

    def _product(self, inverse: Tensor, gradient: Tensor) -> Tensor:
        return inverse @ gradient


class DiagonalNorm(NormLayer):
    """The diagonal only."""

    mode = "diag"

    @property
    def factor_shapes(self) -> Shapes:
        return {"F": self.gradient_shape}

    def _inverse(self, fisher: Tensor, damping: float) -> Tensor:
        return 1.0 / (fisher + damping)

    def _product(self, inverse: Tensor, gradient: Tensor) -> Tensor:
        return inverse * gradient


def norm_layer(name: str, module: nn.Module, options: KfacOptions) -> NormLayer:
    """The layer of a normalisation module, with the structure that `bn_fisher` names."""
    kinds: tuple[type[NormLayer], ...] = (UnitNorm, FullNorm, DiagonalNorm)
    layer = next(kind for kind in kinds if kind.mode == options.bn_fisher)(name, module, options)
    limit = options.max_factor_dim
    if isinstance(layer, FullNorm) and limit is not None and layer.factor_shapes["F"][0] > limit:
        return UnitNorm(name, module, options)
    return layer


def normalize(module: nn.Module, x: Tensor, shared: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x̂, the output of a normalisation layer before scale and shift; `shared` are (mean, 1/σ) of batch
    norm, if they are not those of `x` or the running ones."""
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return nn.functional.rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return nn.functional.group_norm(x, module.num_groups, eps=module.eps)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    if shared is not None:
        mean, scale = (v.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2)) for v in shared)
        return (x - mean) * scale
    if not module.training and module.running_mean is not None:
        assert module.running_var is not None
        mean, var = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
        return nn.functional.batch_norm(x, mean, var, eps=module.eps)
    return nn.functional.batch_norm(x, None, None, training=True, eps=module.eps)


def _channels_last(tensor: Tensor) -> Tensor:
    """`[n, channels, ...]` to `[n, positions, channels]`."""
    return tensor.flatten(2).mT if tensor.dim() > 2 else tensor[:, None]
