"""One layer as K-FAC sees it: statistics, running averages and what its curvature does to a gradient.

A `Layer` holds the geometry of a module and no state. Everything it computes is a function of its
arguments: the state of a layer is a `LayerState`, gradients are matrices in the layout of factors.py.
How sums and states travel between processes is not its business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.factors import host_copy, statistics_dtype
from elastic_kfac.errors import StateError

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


@dataclass(frozen=True)
class LayerState:
    """What K-FAC keeps of one layer between steps. A value: every change makes a new one."""

    factors: Mapping[str, Tensor] = field(default_factory=dict)
    """Running averages by factor name: `A` and `G`, or `F` of a normalisation layer."""
    factor_updates: int = 0
    """Means that went into the running averages."""
    decomposition: Mapping[str, Tensor] = field(default_factory=dict)
    """Eigendecompositions or inverses of the factors at `inverse_step`; empty where this rank does not
    precondition the layer."""
    inverse_step: int = -1
    """The step that made the decomposition; -1 before the first one."""
    floor: float = 0.0
    """What is added to the factor of the output gradients before it is decomposed, times I."""

    @property
    def floored(self) -> Mapping[str, Tensor]:
        """The factors as they are decomposed."""
        if not self.floor:
            return self.factors
        name = list(self.factors)[-1]
        factor = self.factors[name].clone()
        (factor if factor.dim() == 1 else factor.diagonal(dim1=-2, dim2=-1)).add_(self.floor)
        return {**self.factors, name: factor}

    def where(self, flag: Tensor, other: LayerState) -> LayerState:
        """This state where `flag` is true, else the tensors of `other`."""
        both = ((self.factors, other.factors), (self.decomposition, other.decomposition))
        factors, decomposition = (
            {n: t if t is old[n] else torch.where(flag, t, old[n]) for n, t in new.items()}
            for new, old in both
        )
        return replace(self, factors=factors, decomposition=decomposition)

    def decomposed(self, parts: Mapping[str, Tensor], step: int) -> LayerState:
        """With new `parts` of the decomposition, made in `step`."""
        merged = {**self.decomposition, **parts}
        return replace(self, decomposition=merged, inverse_step=step)


class Observation(NamedTuple):
    """What one forward call contributes, and what its backward pass will need."""

    rows: int
    """Samples times positions that share the weight."""
    input_sum: Tensor | None = None
    kept: Tensor | None = None
    """The input itself, where the sum over the output gradients depends on it."""


class Layer(ABC):
    """Geometry and mathematics of one covered layer."""

    factor_names: tuple[str, ...]
    """`A` of the inputs, `G` of the output gradients, or `F` of both."""
    adds_calls: ClassVar[bool] = False
    """Whether `output_sum` gives gradients of samples `[n, ...]`, to be added over the calls that see a
    sample before they are `squared`. Elsewhere a further call is further rows."""
    guarded: ClassVar[bool] = False
    """Whether a non-finite result is replaced by the unpreconditioned gradient."""

    def __init__(self, name: str, module: nn.Module, options: KfacOptions) -> None:
        self.name = name
        self.module = module
        self.options = options

    @property
    def output_factor(self) -> str | None:
        """The factor of the output gradients."""
        return None if self.factor_names == ("A",) else self.factor_names[-1]

    # -- geometry -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Weight first, then bias."""

    @property
    @abstractmethod
    def factor_shapes(self) -> Shapes:
        """Shape of every factor; one dimension is a diagonal."""

    @property
    @abstractmethod
    def decomposition_shapes(self) -> Shapes:
        """Shape of every tensor of a decomposition, before it exists."""

    @property
    @abstractmethod
    def gradient_shape(self) -> Shape:
        """Shape of a gradient in matrix layout."""

    @property
    def dtype(self) -> torch.dtype:
        """At least float32."""
        return statistics_dtype(self.parameters[0].dtype)

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def empty(self) -> Tensor:
        """Nothing, of the type and on the device of its statistics."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def kept(self) -> str:
        """What is kept of factors wider than `max_factor_dim`, in words."""
        return ""

    @property
    def continues(self) -> bool:
        """Whether a decomposition depends on the last one."""
        return False

    def is_diagonal(self, factor: str) -> bool:
        """Whether a factor is stored as its diagonal."""
        return len(self.factor_shapes[factor]) == 1

    # -- passes ---------------------------------------------------------------------------------

    @property
    def weight_rows(self) -> slice | None:
        """The part of the first parameter that is this layer's; None for all of it."""
        return None

    def samples_in(self, inputs: Tensor) -> int | None:
        """Samples in the inputs of a call, where their shape leaves no doubt."""
        return 1 if inputs.dim() <= self._unbatched_dims else None

    def samples_first(self, tensor: Tensor, axis: int) -> Tensor:
        """An input or output gradient as `[n, ...]`; a call without the dimension is one sample.

        Args:
            tensor: As the module was called.
            axis: The dimension that counts samples; the first one where it does not exist: in `[n, d]`
                after pooling over positions, in flattened rows, in images.
        """
        leading = self._leading_dims(tensor)
        if leading <= 0:
            return tensor.unsqueeze(0)
        return tensor.movedim(axis, 0) if 0 < axis < leading else tensor

    def _leading_dims(self, tensor: Tensor) -> int:
        """Dimensions that count samples and positions."""
        return tensor.dim() - self._unbatched_dims

    _unbatched_dims: int = 1
    """Dimensions of a call with one sample and without a batch dimension."""

    @property
    def reduces(self) -> bool:
        """Whether the positions of a sample in one call count as one row."""
        return False

    def masked(self, mask: Tensor) -> Layer:
        """The layer as it sees passes where the samples `[n]`, or positions `[n, ...]`, are real in which
        `mask` is true; itself, if sums over positions of a sample leave out the others anyway."""
        return self

    def note(self) -> Any:
        """What the module alone knows about the call that it has just made, and its statistics need."""
        return None

    def noting(self, note: Any) -> Layer:
        """The layer as it sees a call with this note, other than None."""
        return self

    def misfit(self, inputs: Tensor) -> str:
        """Why the mask cannot be right for a call with `inputs [n, ...]`; empty if it can."""
        return ""

    @abstractmethod
    def weight_gradient(self, inputs: Tensor, gradients: Tensor) -> Tensor:
        """What a call with `inputs [n, ...]` and output `gradients [n, ...]` adds to the gradient of the
        first parameter, in its shape: what the layer's type computes, whatever the module did."""

    # -- statistics -----------------------------------------------------------------------------

    @abstractmethod
    def observe(self, inputs: Tensor, due: frozenset[str]) -> Observation:
        """Sums over the input `[n, ...]` of one forward call, for the factors that are due."""

    @abstractmethod
    def output_rows(self, gradients: Tensor) -> int:
        """The rows of an `Observation`, counted in the output gradients `[n, ...]` of the same call."""

    @abstractmethod
    def output_sum(self, gradients: Tensor, kept: Tensor | None) -> Tensor:
        """The sum over the output gradients `[n, ...]` of the same call."""

    def squared(self, sums: Tensor) -> Tensor:
        """The factor's sum over samples, from what `output_sum` gave over all calls (`adds_calls`)."""
        return sums

    @abstractmethod
    def normalizers(self, samples: float, rows: float) -> dict[str, float]:
        """Divisors that turn global sums into means, from global counts."""

    def average(
        self,
        state: LayerState,
        sums: Mapping[str, Tensor],
        normalizers: Mapping[str, float],
        decay: float,
        *,
        consume: bool = False,
    ) -> LayerState:
        """Moves the running averages: `X̄ ← ρ_k X̄ + (1 − ρ_k) X`, X = sum / normalizer.

        `ρ_k = min(1 − 1/k, ρ)` with k counting updates from 1 (Martens and Grosse 2015, section 5), or
        ρ throughout with `ema_init="identity"`.

        Args:
            consume: Whether the new averages may be where the sums are.
        """
        from_first = self.options.ema_init == "first"
        weight = min(1.0 - 1.0 / (state.factor_updates + 1), decay) if from_first else decay
        factors = dict(state.factors)
        for name, total in sums.items():
            known = factors.get(name)
            if known is None and not from_first:
                known = self._identity(name)
            if known is None or weight == 0.0:
                factors[name] = total.div(normalizers[name])
            else:
                scale = (1.0 - weight) / normalizers[name]
                # Fresh memory of this size costs more than the arithmetic.
                in_place = consume and total.dtype == known.dtype and _is_alone(total)
                scaled = total.mul_(scale) if in_place else total.to(known.dtype).mul(scale)
                factors[name] = scaled.add_(known, alpha=weight)
        return replace(state, factors=factors, factor_updates=state.factor_updates + 1)

    def _identity(self, factor: str) -> Tensor:
        shape = self.factor_shapes[factor]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        return torch.eye(shape[-1], dtype=self.dtype, device=self.device).expand(shape)

    # -- curvature ------------------------------------------------------------------------------

    @property
    def decomposer(self) -> Callable[..., dict[str, Tensor]] | None:
        """`decompose` without the module, for another process; None where there is no such thing."""
        return None

    @abstractmethod
    def decompose(
        self,
        factors: Mapping[str, Tensor],
        names: tuple[str, ...],
        damping: float,
        last: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """New decompositions of the named factors; `last` is what this rank holds of the one in use.

        Raises:
            NumericalError: If every fallback failed.
        """

    def corrected(self, state: LayerState, samples: float, decay: float) -> LayerState:
        """With eigenvalues that `.grad`, the mean over `samples`, has corrected; as it was for forms
        without such (`CorrectedForm` has them). `decay` is the weight of the old ones."""
        return state

    def prepared(self, decomposition: Mapping[str, Tensor], damping: float) -> Mapping[str, Tensor]:
        """A decomposition, for `precondition` with this damping, with what follows from both."""
        return decomposition

    @abstractmethod
    def precondition(
        self,
        decomposition: Mapping[str, Tensor],
        gradient: Tensor,
        damping: float,
        used: Tensor | None = None,
    ) -> Tensor:
        """`(F + γI)⁻¹` times a gradient in matrix layout, or times its `used` columns."""

    # -- gradients ------------------------------------------------------------------------------

    def has_gradient(self) -> bool:
        """Whether every parameter of the layer has a gradient."""
        return all(p.grad is not None for p in self.parameters)

    @property
    def uses_few_rows(self) -> bool:
        """Whether its weight is a large table of which a pass looks up few rows."""
        return False

    def used_columns(
        self, weight_decay: float = 0.0, looked_up: Tensor | None = None
    ) -> Tensor | None:
        """The columns of the gradient that alone need preconditioning, because the others are zero and
        stay so; None is all of them. A function of the gradient: the same on every rank.

        Args:
            weight_decay: Of the gradient.
            looked_up: Rows, ascending, outside of which the gradient is known to be zero.
        """
        return None

    @abstractmethod
    def gradient(self, weight_decay: float = 0.0, used: Tensor | None = None) -> Tensor:
        """`.grad` in matrix layout, or its `used` columns, plus `weight_decay` times the weight; biases,
        scales and shifts are not decayed."""

    @abstractmethod
    def set_gradient(self, value: Tensor, used: Tensor | None = None) -> None:
        """Writes a matrix, or its `used` columns, back into `.grad`."""

    # -- saved form -----------------------------------------------------------------------------

    def saved(self, state: LayerState) -> dict[str, Any]:
        """A state as plain numbers and copies of its tensors in the memory of the host."""
        return {
            **({"floor": state.floor} if state.floor else {}),
            "factor_updates": state.factor_updates,
            "inverse_step": state.inverse_step,
            "factors": {name: host_copy(t) for name, t in state.factors.items()},
            "second_order": {name: host_copy(t) for name, t in state.decomposition.items()},
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raises StateError unless saved tensors have this layer's shapes."""
        for kind, expected in (
            ("factors", self.factor_shapes),
            ("second_order", self.decomposition_shapes),
        ):
            shapes = {name: tuple(tensor.shape) for name, tensor in saved[kind].items()}
            if shapes and shapes != expected:
                raise StateError(
                    f"saved {kind} of layer {self.name} have other shapes",
                    given=shapes,
                    allowed=expected,
                    change="give max_factor_dim and factor_rank the values that they had, or start "
                    "without this state",
                )

    def restored(self, saved: Mapping[str, Any]) -> LayerState:
        """The state that `saved` wrote, on this layer's device and in its dtype."""
        return LayerState(
            self.placed(saved["factors"]),
            int(saved["factor_updates"]),
            self.placed(saved["second_order"]),
            int(saved["inverse_step"]),
            float(saved.get("floor", 0.0)),
        )

    def placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors where this layer computes."""
        return {
            name: tensor.detach().to(self.device, self.dtype, copy=True)
            for name, tensor in tensors.items()
        }


def _is_alone(tensor: Tensor) -> bool:
    """Whether nothing else is in its memory."""
    own = tensor.numel() * tensor.element_size()
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == own
