"""Blocks of normalisation layers: a small Fisher of scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elastic_kfac.curvature import inverses
from elastic_kfac.curvature.block import Block, BlockOptions, Call
from elastic_kfac.curvature.factors import norm_gradient_sum


class NormBlock(Block):
    """Fisher of the scale and shift of a BatchNorm, LayerNorm or GroupNorm (spec 1.1)."""

    factor_names = ("F",)
    guarded = True

    def __init__(self, name: str, module: nn.Module, options: BlockOptions) -> None:
        super().__init__(name, module, options)
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        self._parameters: tuple[nn.Parameter, ...] = (weight,)
        if isinstance(bias, nn.Parameter) and bias.requires_grad:
            self._parameters = (weight, bias)
        self._features = weight.numel()
        self._mode = options.bn_fisher
        self.is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return self._parameters

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        p, c = len(self._parameters), self._features
        if self._mode == "unit":
            return {"F": (c, p, p)}
        return {"F": (c * p, c * p) if self._mode == "full" else (c * p,)}

    def is_diagonal(self, name: str) -> bool:
        return self._mode == "diag"

    @property
    def second_order_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"F_inverse": self.factor_shapes["F"]}

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        p, c = len(self._parameters), self._features
        return (c, p) if self._mode == "unit" else (c * p,)

    def open_call(self, inputs: Tensor, micro_batch: int) -> Call:
        return Call(micro_batch, inputs.shape[0], inputs.shape[0], inputs.detach())

    def output_sum(self, call: Call, gradients: Tensor) -> Tensor:
        assert call.inputs is not None
        normalized = self._normalize(call.inputs)
        call.inputs = None
        if isinstance(self.module, nn.LayerNorm):
            shape = (gradients.shape[0], -1, self._features)
            normalized, gradients = normalized.reshape(shape), gradients.reshape(shape)
        else:
            normalized = normalized.flatten(2).mT if normalized.dim() > 2 else normalized[:, None]
            gradients = gradients.flatten(2).mT if gradients.dim() > 2 else gradients[:, None]
        return norm_gradient_sum(
            normalized, gradients, bias=len(self._parameters) == 2, mode=self._mode
        )

    def _normalize(self, inputs: Tensor) -> Tensor:
        """x̂: the layer's output before scale and shift."""
        module = self.module
        x = inputs.to(self.dtype)
        if isinstance(module, nn.LayerNorm):
            return nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            return nn.functional.group_norm(x, module.num_groups, eps=module.eps)
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        # A layer that normalises over more than its own inputs says with what.
        shared = getattr(module, "shared_statistics", None)
        if shared is not None:
            mean, scale = (v.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2)) for v in shared)
            return (x - mean) * scale
        return nn.functional.batch_norm(x, None, None, training=True, eps=module.eps)

    def normalizers(self, samples: float, rows: float) -> dict[str, float]:
        return {"F": samples}

    def decompose(self, names: tuple[str, ...], damping: float) -> dict[str, Tensor]:
        factor = self.factors["F"]
        if self.is_batch_norm:
            damping = damping * self.options.bn_damping_multiplier
        if self._mode == "diag":
            return {"F_inverse": 1.0 / (factor + damping)}
        if self._mode == "unit" and factor.shape[-1] == 2:
            return {"F_inverse": inverses.two_by_two_inverse(factor, damping)}
        return {"F_inverse": inverses.damped_inverse(factor, damping)}

    def precondition(self, gradient: Tensor, damping: float) -> Tensor:
        inverse = self.second_order["F_inverse"]
        if self._mode == "unit":
            return (inverse @ gradient.unsqueeze(-1)).squeeze(-1)
        return inverse @ gradient if self._mode == "full" else inverse * gradient

    def gradient(self, weight_decay: float = 0.0) -> Tensor:
        grads = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            grads.append(parameter.grad.to(self.dtype).reshape(-1))
        return torch.stack(grads, -1) if self._mode == "unit" else torch.cat(grads)

    def set_gradient(self, value: Tensor) -> None:
        parts = value.unbind(-1) if self._mode == "unit" else value.split(self._features)
        for parameter, part in zip(self._parameters, parts, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(part.reshape(parameter.grad.shape))
