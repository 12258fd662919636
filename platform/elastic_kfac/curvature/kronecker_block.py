"""Blocks whose Fisher is a Kronecker product A ⊗ G."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elastic_kfac.curvature import inverses
from elastic_kfac.curvature.block import Block, BlockOptions, Call
from elastic_kfac.curvature.damping import split_damping
from elastic_kfac.curvature.factors import (
    conv_input_sum,
    conv_output_sum,
    conv_positions,
    embedding_input_sum,
    linear_input_sum,
    linear_output_sum,
)
from elastic_kfac.curvature.preconditioning import (
    eigen_denominator,
    eigen_precondition,
    inverse_precondition,
)


class KroneckerBlock(Block):
    """A ⊗ G of a layer with a weight matrix: Linear, Conv2d, Embedding, attention projections."""

    factor_names = ("A", "G")
    has_input_factor = True

    def __init__(
        self,
        name: str,
        module: nn.Module,
        options: BlockOptions,
        *,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rows: slice | None = None,
        bias_rows: slice | None = None,
    ) -> None:
        """`rows` and `bias_rows` select the parts of packed parameters that this block covers."""
        super().__init__(name, module, options)
        self._weight = weight
        self._bias = bias if bias is not None and bias.requires_grad else None
        self.rows = rows
        self._bias_rows = bias_rows
        self._conv = module if isinstance(module, nn.Conv2d) else None
        self._embedding = module if isinstance(module, nn.Embedding) else None
        self._groups = self._conv.groups if self._conv is not None else 1
        shape = weight.shape if rows is None else weight[rows].shape
        if self._embedding is not None:
            g, a = shape[1], shape[0]
        else:
            g, a = shape[0] // self._groups, shape[1:].numel()
        a += self._bias is not None
        self.a_dim, self.g_dim = a, g

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self._weight,) if self._bias is None else (self._weight, self._bias)

    @property
    def groups(self) -> int:
        """Independent (A, G) pairs: the groups of a grouped convolution."""
        return self._groups

    def _batched(self, *shape: int) -> tuple[int, ...]:
        return (self._groups, *shape) if self._groups > 1 else shape

    def is_diagonal(self, name: str) -> bool:
        return name == "A" and self._embedding is not None

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        a, g = self.a_dim, self.g_dim
        return {
            "A": (a,) if self._embedding is not None else self._batched(a, a),
            "G": self._batched(g, g),
        }

    @property
    def second_order_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self.factor_shapes
        if self.options.method == "inverse":
            return {"A_inverse": shapes["A"], "G_inverse": shapes["G"]}
        result = {} if self._embedding is not None else {"A_vectors": shapes["A"]}
        result["G_vectors"] = shapes["G"]
        if self.options.precompute:
            return {**result, "E_reciprocal": self.gradient_shape}
        return {
            **result,
            "A_values": self._batched(self.a_dim),
            "G_values": self._batched(self.g_dim),
        }

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        return self._batched(self.g_dim, self.a_dim)

    def open_call(self, inputs: Tensor, micro_batch: int) -> Call:
        samples = inputs.shape[0]
        total: Tensor | None = None
        wanted = "A" in self.collected
        if self._conv is not None:
            rows = samples * conv_positions(inputs, self._conv)
            if wanted:
                total = conv_input_sum(inputs, self._conv, bias=self._bias is not None)
        elif self._embedding is not None:
            rows = inputs.numel()
            if wanted:
                table = self._embedding
                counts = embedding_input_sum(inputs, table.num_embeddings, table.padding_idx)
                total = counts.to(self.dtype)
        else:
            reduce = self.options.weight_sharing == "reduce"
            rows = samples if reduce else inputs[..., 0].numel()
            if wanted:
                total = linear_input_sum(inputs, bias=self._bias is not None, reduce=reduce)
        return Call(micro_batch, samples, rows, total)

    def output_sum(self, call: Call, gradients: Tensor) -> Tensor:
        if self._conv is not None:
            return conv_output_sum(gradients, self._groups)
        reduce = self.options.weight_sharing == "reduce" and self._embedding is None
        return linear_output_sum(gradients, reduce=reduce)

    def normalizers(self, samples: float, rows: float) -> dict[str, float]:
        positions = rows / samples
        scale = self.options.factor_scale
        if scale == "per_sample" or (scale == "sc20" and self._conv is None):
            return {"A": samples, "G": rows}
        if scale == "sc20":
            return {"A": samples * positions**2, "G": rows / positions**2}
        spatial = positions**2 if self._conv is not None else 1.0
        return {"A": rows * spatial, "G": rows * spatial}

    def decompose(self, names: tuple[str, ...], damping: float) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        if self.options.method == "inverse":
            shifts = split_damping(
                self.factors["A"], self.factors["G"], damping, self.options.inverse_damping
            )
            for name, shift in zip(("A", "G"), shifts, strict=True):
                if name not in names:
                    continue
                factor = self.factors[name]
                if self.is_diagonal(name):
                    result["A_inverse"] = 1.0 / (factor + shift)
                else:
                    result[f"{name}_inverse"] = inverses.damped_inverse(factor, shift)
            return result
        for name in names:
            if self.is_diagonal(name):
                result["A_values"] = self.factors[name].clone()
                continue
            values, vectors = inverses.eigen(self.factors[name])
            result[f"{name}_values"], result[f"{name}_vectors"] = values, vectors
        if self.options.precompute:
            # The eigenvalues themselves are not needed any more.
            a_values, g_values = result.pop("A_values"), result.pop("G_values")
            denominator = eigen_denominator(a_values, g_values, damping)
            result["E_reciprocal"] = denominator.reciprocal_()
        return result

    def precondition(self, gradient: Tensor, damping: float) -> Tensor:
        held = self.second_order
        if self.options.method == "inverse":
            return inverse_precondition(gradient, held["A_inverse"], held["G_inverse"])
        return eigen_precondition(
            gradient,
            held.get("A_vectors"),
            held["G_vectors"],
            held.get("A_values"),
            held.get("G_values"),
            damping,
            held.get("E_reciprocal"),
        )

    def gradient(self, weight_decay: float = 0.0) -> Tensor:
        grad = self._target(self._weight, self.rows).to(self.dtype)
        if weight_decay:
            value = self._weight.detach()
            value = value if self.rows is None else value[self.rows]
            grad = grad.add(value.to(self.dtype), alpha=weight_decay)
        if self._embedding is not None:
            return grad.t()
        if self._bias is None:
            return grad.reshape(self.gradient_shape)
        matrix = grad.reshape(self._batched(self.g_dim, self.a_dim - 1))
        bias = self._target(self._bias, self._bias_rows).to(self.dtype)
        return torch.cat((matrix, bias.reshape(self._batched(self.g_dim, 1))), -1)

    def set_gradient(self, value: Tensor) -> None:
        if self._embedding is not None:
            value = value.t()
        elif self._bias is not None:
            self._target(self._bias, self._bias_rows).copy_(value[..., -1].reshape(-1))
            value = value[..., :-1]
        target = self._target(self._weight, self.rows)
        target.copy_(value.reshape(target.shape))

    @staticmethod
    def _target(parameter: nn.Parameter, rows: slice | None) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad if rows is None else parameter.grad[rows]
