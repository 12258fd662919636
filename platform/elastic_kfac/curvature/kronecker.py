"""Layers whose Fisher is a Kronecker product A ⊗ G: Linear, Embedding, attention projections."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature import factors
from elastic_kfac.curvature.factors import (
    embedding_input_sum,
    linear_input_sum,
    linear_input_sums,
    linear_output_sum,
    statistics_dtype,
)
from elastic_kfac.curvature.layer import Layer, LayerState, Observation, Shape, Shapes
from elastic_kfac.curvature.preconditioning import CorrectedForm, EigenForm, InputForm, InverseForm
from elastic_kfac.curvature.sides import Diagonal, Side, Whole, bounded

_SMALL = 8192
"""Elements of both factors together; beyond, products cost more than calls."""

_LARGE_TABLE = 1 << 17
"""Elements of an embedding from which reading its gradient costs more than following its look-ups."""

_STACKED = (
    *("gradient", "precondition", "set_gradient"),
    *("_weight_part", "_bias_part", "_to_matrix", "_from_matrix"),
)
"""What a layer must not do in its own way to be stacked."""


_OTHER = {"A": "G", "G": "A"}

_KINDS: dict[Hashable, int] = {}
"""Numbers of what layers have in common, which are compared faster."""


class KroneckerLayer(Layer):
    """A weight matrix `[g, a]`, or `groups` of them; a bias is the last column, and every use of a weight
    that several modules share may have its own."""

    factor_names: tuple[str, ...] = ("A", "G")
    groups = 1
    many_positions = False
    _real: Tensor | None = None
    """Which samples `[n]` or positions `[n, ...]` count; None for all."""
    _is_shared = False
    """Whether several modules use the weight."""
    _offsets = 1
    """Kernel offsets of a channel, which are kept together."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        options: KfacOptions,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__(name, module, options)
        self.weight = weight
        self.bias = bias if bias is not None and bias.requires_grad else None
        self.biases: tuple[nn.Parameter, ...] = () if self.bias is None else (self.bias,)
        self.g_dim, self.inputs = self._dimensions(self._weight_part(weight).shape)
        self._settle()

    def _settle(self) -> None:
        """What follows from the number of biases."""
        self.a_dim = self.inputs + len(self.biases)
        self.sides: dict[str, Side] = {"A": self._input_side(), "G": self._side(self.g_dim)}
        """What is kept of a factor, by name."""
        self._form = self._chosen_form()
        kind = self._form, self.weight.shape, len(self.biases)
        self._kind = _KINDS.setdefault(kind, len(_KINDS))
        size = self.groups * (self.a_dim**2 + self.g_dim**2)
        self._is_small = size <= _SMALL and all(
            getattr(type(self), name) is getattr(KroneckerLayer, name) for name in _STACKED
        )

    def _chosen_form(self) -> EigenForm | InverseForm | InputForm:
        options = self.options
        if options.method == "one_sided":
            self.sides, self.factor_names = {"A": self.sides["A"]}, ("A",)
            return InputForm(self.sides["A"], Whole(self.g_dim))
        if options.method == "ekfac":
            return CorrectedForm(**self.sides, precompute=False)
        if options.method == "eigen":
            return EigenForm(**self.sides, precompute=options.precompute)
        return InverseForm(**self.sides, split=options.inverse_damping)

    @property
    def stack_key(self) -> Hashable:
        """Small layers with equal keys can be stacked (see stacks.py); None: only by itself."""
        if not self._is_small or self._is_shared:
            return None
        return self._kind, self.weight.dtype, self.weight.device

    def _side(self, width: int, unit: int = 1, biases: int = 0) -> Side:
        limit = self.options.max_factor_dim
        return bounded(
            width,
            limit,
            unit=unit,
            biases=biases,
            groups=self.groups,
            many_positions=self.many_positions,
            rank=self.options.factor_rank,
        )

    def _input_side(self) -> Side:
        side = self._side(self.a_dim, self._offsets, len(self.biases))
        own = [self.inputs + i for i, bias in enumerate(self.biases) if bias is self.bias]
        return replace(side, bias_at=own[0] if own else None)

    @property
    def reduces(self) -> bool:
        # KFAC-reduce, Eschenhagen et al. 2023.
        return self.options.weight_sharing == "reduce"

    def masked(self, mask: Tensor) -> Self:
        twin = copy.copy(self)
        twin._real = mask
        return twin

    def _rows(self, tensor: Tensor) -> Tensor:
        """The rows `[m, 1, ...]` of `tensor [n, ...]` that count; all of them, if it has no positions any
        more."""
        real = self._real
        if real is None or tensor.shape[: real.dim()] != real.shape:
            return tensor
        if tensor.dim() == real.dim() and tensor.is_floating_point():
            return tensor  # features [n, d], as wide as the sequence is long
        return tensor[real].unsqueeze(1)

    def can_share(self, other: Layer) -> bool:
        """Whether both use the same parameter as the same matrix."""
        return (
            isinstance(other, KroneckerLayer)
            and type(other) is type(self)
            and other.weight is self.weight
            and other.groups == self.groups
        )

    def sharing(self, others: Sequence[KroneckerLayer]) -> Self:
        """This use of a weight as a part of the layer that all uses make up, under the first one's name.

        The uses are further positions (Eschenhagen et al. 2023, expand): A and G are sums over all of
        them. An input has one homogeneous coordinate per bias, 1 for its own and 0 for the others.
        """
        use = copy.copy(self)
        use.name, use._is_shared = others[0].name, True
        use.biases = tuple({id(b): b for other in others for b in other.biases}.values())
        use._settle()
        return use

    def _dimensions(self, weight_shape: torch.Size) -> tuple[int, int]:
        """(outputs, inputs) of one group, without the coordinate of the bias."""
        return weight_shape[0] // self.groups, weight_shape[1:].numel()

    def _weight_part(self, weight: Tensor) -> Tensor:
        """The rows of the weight, or of its gradient, that this layer covers."""
        return weight

    def _bias_part(self, bias: Tensor) -> Tensor:
        return bias

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.weight, *self.biases)

    def _grouped(self, *shape: int) -> Shape:
        return (self.groups, *shape) if self.groups > 1 else shape

    @property
    def factor_shapes(self) -> Shapes:
        return {name: self._grouped(*side.shape) for name, side in self.sides.items()}

    @property
    def kept(self) -> str:
        parts = [(name, side) for name, side in self.sides.items() if side.kept]
        return ", ".join(f"{name} of {side.width}: {side.kept}" for name, side in parts)

    def _identity(self, factor: str) -> Tensor:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self.sides[factor].identity(like).expand(self.factor_shapes[factor])

    @property
    def continues(self) -> bool:
        return self._form.continues

    @property
    def decomposition_shapes(self) -> Shapes:
        return {name: self._grouped(*shape) for name, shape in self._form.shapes.items()}

    @property
    def gradient_shape(self) -> Shape:
        return self._grouped(self.g_dim, self.a_dim)

    @abstractmethod
    def _count_rows(self, inputs: Tensor) -> int: ...

    @abstractmethod
    def _input_sum(self, inputs: Tensor) -> Tensor: ...

    def observe(self, inputs: Tensor, due: frozenset[str]) -> Observation:
        rows = self._count_rows(inputs)
        if "A" not in due:
            return Observation(rows)
        return Observation(rows, self.sides["A"].widened(self._input_sum(inputs)))

    def normalizers(self, samples: float, rows: float) -> dict[str, float]:
        if self.options.factor_scale == "kaisa":
            return {"A": rows, "G": rows}
        return {"A": samples, "G": rows}

    @property
    def decomposer(self) -> Callable[..., dict[str, Tensor]]:
        return self._form.decompose

    def decompose(
        self,
        factors: Mapping[str, Tensor],
        names: tuple[str, ...],
        damping: float,
        last: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        return self._form.decompose(factors, names, damping, last)

    def corrected(self, state: LayerState, samples: float, decay: float) -> LayerState:
        held = state.decomposition
        if not isinstance(self._form, CorrectedForm) or not held or not self.has_gradient():
            return state
        parts = self._form.corrected(held, self.gradient(), samples, state.floor, decay)
        return replace(state, decomposition={**held, **parts})

    def prepared(self, decomposition: Mapping[str, Tensor], damping: float) -> Mapping[str, Tensor]:
        return self._form.prepared(decomposition, damping, is_small=self._is_small)

    def precondition(
        self,
        decomposition: Mapping[str, Tensor],
        gradient: Tensor,
        damping: float,
        used: Tensor | None = None,
    ) -> Tensor:
        return self._form.precondition(decomposition, gradient, damping, used)

    def _to_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self._grouped(self.g_dim, self.inputs))

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix

    def has_gradient(self) -> bool:
        # A pass may leave out some uses of a shared weight, and their biases with them.
        return self.weight.grad is not None if self._is_shared else super().has_gradient()

    def gradient(self, weight_decay: float = 0.0, used: Tensor | None = None) -> Tensor:
        assert self.weight.grad is not None
        grad = self._weight_part(self.weight.grad).to(self.dtype)
        if weight_decay:
            weight = self._weight_part(self.weight.detach())
            grad = grad.add(weight.to(self.dtype), alpha=weight_decay)
        columns = [self._to_matrix(grad)]
        for bias in self.biases:
            column = grad.new_zeros(bias.shape) if bias.grad is None else bias.grad
            column = self._bias_part(column).to(self.dtype)
            columns.append(column.reshape(self._grouped(self.g_dim, 1)))
        return torch.cat(columns, -1) if self.biases else columns[0]

    def set_gradient(self, value: Tensor, used: Tensor | None = None) -> None:
        for index, bias in enumerate(self.biases, start=self.inputs):
            if bias.grad is not None:
                column = value[..., index]
                self._bias_part(bias.grad).copy_(column if column.dim() == 1 else column.flatten())
        if self.biases:
            value = value[..., : self.inputs]
        assert self.weight.grad is not None
        target = self._weight_part(self.weight.grad)
        value = self._from_matrix(value)
        target.copy_(value if value.shape == target.shape else value.reshape(target.shape))


class LinearLayer(KroneckerLayer):
    """nn.Linear on `[n, ..., d_in]`; the dimensions between are positions that share the weight."""

    def _summed(self, tensor: Tensor, *, mean: bool) -> Tensor:
        """`tensor [n, ..., d]` as one row per sample that counts, for KFAC-reduce."""
        real = self._real
        if real is None or tensor.dim() < 3 or tensor.shape[: real.dim()] != real.shape:
            found = tensor if tensor.dim() < 3 else tensor.flatten(1, -2).sum(1)
            count: Tensor | float = tensor.shape[1:-1].numel()
        else:
            real = real.reshape(*real.shape, *[1] * (tensor.dim() - 1 - real.dim()))
            real = real.expand(tensor.shape[:-1]).flatten(1)
            some = real.any(1)
            weights, rows = real[some].to(tensor.dtype), tensor.flatten(1, -2)[some]
            found = (rows * weights.unsqueeze(-1)).sum(1)
            count = weights.sum(1, keepdim=True)
        return found / count if mean else found

    def weight_gradient(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        inputs, gradients = self._rows(inputs), self._rows(gradients)
        return gradients.reshape(-1, gradients.shape[-1]).t() @ inputs.reshape(
            -1, inputs.shape[-1]
        ).to(gradients.dtype)

    def _count_rows(self, inputs: Tensor) -> int:
        return self.output_rows(inputs)

    @property
    def observes_together(self) -> bool:
        """Whether `observe_all` may take its calls."""
        return (
            type(self) is LinearLayer
            and not self.reduces
            and self.stack_key is not None
            and isinstance(self.sides["A"], Whole)
        )

    def observe_all(self, inputs: Sequence[Tensor]) -> list[Observation]:
        """What `observe` returns for calls of this layer and others, of one shape."""
        rows = self._count_rows(inputs[0])
        sums = linear_input_sums(inputs, bias=self.bias is not None, side=self.sides["A"])
        return [Observation(rows, total) for total in sums]

    def _input_sum(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(statistics_dtype(inputs.dtype))
        rows = self._summed(inputs, mean=True) if self.reduces else self._rows(inputs)
        return linear_input_sum(rows, bias=self.bias is not None, side=self.sides["A"])

    def output_rows(self, gradients: Tensor) -> int:
        if self.reduces:
            return self._summed(gradients[..., :1], mean=False).shape[0]
        return self._rows(gradients[..., :1]).numel()

    def output_sum(self, gradients: Tensor, kept: Tensor | None) -> Tensor:
        gradients = gradients.to(statistics_dtype(gradients.dtype))
        rows = self._summed(gradients, mean=False) if self.reduces else self._rows(gradients)
        return linear_output_sum(rows, side=self.sides["G"])


class AttentionProjection(LinearLayer):
    """One of the four projections inside nn.MultiheadAttention, perhaps rows of a packed weight."""

    def __init__(
        self,
        name: str,
        module: nn.MultiheadAttention,
        options: KfacOptions,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        weight_rows: slice = slice(None),
        bias_rows: slice = slice(None),
    ) -> None:
        self._weight_rows, self._bias_rows = weight_rows, bias_rows
        super().__init__(name, module, options, weight, bias)

    def _weight_part(self, weight: Tensor) -> Tensor:
        return weight[self._weight_rows]

    def _bias_part(self, bias: Tensor) -> Tensor:
        return bias[self._bias_rows]

    @property
    def weight_rows(self) -> slice | None:
        return None if self._weight_rows == slice(None) else self._weight_rows

    def samples_in(self, inputs: Tensor) -> int | None:
        return inputs.shape[1]

    def samples_first(self, tensor: Tensor, axis: int) -> Tensor:
        """`[positions, n, d]`, whatever the layout of the model, to `[n, positions, d]`."""
        return tensor.transpose(0, 1)


def _nonzero_rows(grad: Tensor) -> Tensor:
    # NaN is no zero, either. Bits are compared faster than numbers.
    grad = grad.view(torch.int32) if grad.dtype == torch.float32 else grad
    return ((grad.amax(1) != 0) | (grad.amin(1) != 0)).nonzero().squeeze(1)


class EmbeddingLayer(KroneckerLayer):
    """nn.Embedding: a Linear over one-hot rows, so that A is the diagonal of token counts."""

    module: nn.Embedding
    _unbatched_dims = 0

    def _leading_dims(self, tensor: Tensor) -> int:
        return tensor.dim() - tensor.is_floating_point()  # indices, or their gradients

    @property
    def reduces(self) -> bool:
        return False

    def weight_gradient(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        total = gradients.new_zeros(self.module.weight.shape)
        index = self._rows(inputs).reshape(-1)
        rows = self._rows(gradients).reshape(-1, gradients.shape[-1])
        if self.module.padding_idx is not None:
            rows = rows * (index != self.module.padding_idx).to(rows).unsqueeze(1)
        return total.index_add_(0, index, rows)

    def _dimensions(self, weight_shape: torch.Size) -> tuple[int, int]:
        return weight_shape[1], weight_shape[0]

    def _count_rows(self, inputs: Tensor) -> int:
        return self._rows(inputs).numel()

    def _input_sum(self, inputs: Tensor) -> Tensor:
        table = self.module
        counts = embedding_input_sum(self._rows(inputs), table.num_embeddings, table.padding_idx)
        return counts.to(self.dtype)

    def output_rows(self, gradients: Tensor) -> int:
        return self._rows(gradients)[..., 0].numel()

    def output_sum(self, gradients: Tensor, kept: Tensor | None) -> Tensor:
        return linear_output_sum(self._rows(gradients), side=self.sides["G"])

    def _input_side(self) -> Side:
        return Diagonal(self.a_dim, is_whole=True)

    def _to_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    @property
    def uses_few_rows(self) -> bool:
        return not self._is_shared and self.weight.numel() >= _LARGE_TABLE

    def used_columns(
        self, weight_decay: float = 0.0, looked_up: Tensor | None = None
    ) -> Tensor | None:
        grad = self.weight.grad
        # Finding them on a device would have the host wait for it; there the whole table is cheap.
        if weight_decay or grad is None or not factors.can_be_read(grad):
            return None
        return _nonzero_rows(grad) if looked_up is None else looked_up

    def gradient(self, weight_decay: float = 0.0, used: Tensor | None = None) -> Tensor:
        if used is None:
            return super().gradient(weight_decay)
        assert self.weight.grad is not None
        return self.weight.grad.index_select(0, used).to(self.dtype).t()

    def precondition(
        self,
        decomposition: Mapping[str, Tensor],
        gradient: Tensor,
        damping: float,
        used: Tensor | None = None,
    ) -> Tensor:
        if isinstance(self._form, InputForm):
            return super().precondition(decomposition, gradient, damping, used)
        # Rows of the table lie together in memory: the same from the other side.
        held = {
            _OTHER[name[0]] + name[1:] if name[0] in _OTHER else name: t.mT if name[0] == "E" else t
            for name, t in decomposition.items()
        }
        form = replace(self._form, A=self._form.G, G=self._form.A)
        return form.precondition(held, gradient.mT, damping, used).mT

    def set_gradient(self, value: Tensor, used: Tensor | None = None) -> None:
        if used is None:
            super().set_gradient(value)
        else:
            assert self.weight.grad is not None
            self.weight.grad.index_copy_(0, used, value.t().to(self.weight.grad.dtype))
