"""Curvature blocks: one per layer, holding its statistics, running averages and decompositions.

A block knows the mathematics of its layer and nothing of processes: sums come out of
`take_pending`, go through whatever reduction the optimizer does, and come back in `update_factors`.
Matrices follow the layout of factors.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.curvature.factors import statistics_dtype
from elastic_kfac.errors import StateError

# Key of pending output sums that already are at per-sample scale.
_SAMPLED = 0


@dataclass(frozen=True)
class BlockOptions:
    """What every block of one preconditioner shares."""

    method: str = "eigen"
    inverse_damping: str = "pi"
    factor_scale: str = "per_sample"
    weight_sharing: str = "expand"
    bn_fisher: str = "unit"
    bn_damping_multiplier: float = 1.0
    precompute: bool = False
    ema_init: str = "first"


@dataclass
class Call:
    """One forward call of a layer whose output gradient is still to come."""

    micro_batch: int
    samples: int
    rows: int
    inputs: Tensor | None
    """Sum of the input side, or what the gradient side needs of the input."""
    counted: bool = False


@dataclass
class Pending:
    """Sums of one rank since the last factor update."""

    inputs: Tensor | None = None
    # Keyed by micro-batch size: a mean loss multiplies each gradient by one over that size, and which
    # scale applies is known for certain only at step().
    outputs: dict[int, Tensor] = field(default_factory=dict)
    samples: int = 0
    rows: int = 0
    micro_batch: int = -1


class Block(ABC):
    """Statistics, factors and decompositions of one layer."""

    factor_names: tuple[str, ...]
    has_input_factor = False
    guarded = False
    """Whether a non-finite result is replaced by the plain gradient (spec 1.1, BatchNorm)."""

    def __init__(self, name: str, module: nn.Module, options: BlockOptions) -> None:
        self.name = name
        self.module = module
        self.options = options
        self.factors: dict[str, Tensor] = {}
        self.second_order: dict[str, Tensor] = {}
        self.factor_updates = 0
        self.inverse_step = -1
        self.pending = Pending()
        self.collected: frozenset[str] = frozenset(self.factor_names)
        """The factors whose statistics are gathered in this step; the others stay as they are."""

    # -- layer geometry -------------------------------------------------------------------------

    @property
    @abstractmethod
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Weight first, then bias."""

    @property
    @abstractmethod
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every factor by name."""

    @property
    @abstractmethod
    def second_order_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a decomposition by name, known before it exists."""

    @property
    @abstractmethod
    def gradient_shape(self) -> tuple[int, ...]:
        """Shape of D and P."""

    @property
    def dtype(self) -> torch.dtype:
        """At least float32."""
        return statistics_dtype(self.parameters[0].dtype)

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        return self.parameters[0].device

    def has_gradient(self) -> bool:
        """Whether every parameter of the layer received a gradient in this step."""
        return all(p.grad is not None for p in self.parameters)

    # -- statistics ----------------------------------------------------------------------------

    @abstractmethod
    def open_call(self, inputs: Tensor, micro_batch: int) -> Call:
        """Takes what is needed of a layer input."""

    @abstractmethod
    def output_sum(self, call: Call, gradients: Tensor) -> Tensor:
        """The sum over the gradients of one call."""

    def close_call(
        self, call: Call, gradients: Tensor | None, sampling_weight: float | None = None
    ) -> None:
        """Adds one call to the pending sums.

        Args:
            call: What `open_call` returned.
            gradients: With respect to the output; None adds the input side only.
            sampling_weight: For gradients of sampled labels: what their squares count for.
        """
        pending = self.pending
        if not call.counted:
            call.counted = True
            # A module called several times in one pass sees the same samples at more positions.
            if pending.micro_batch != call.micro_batch:
                pending.samples += call.samples
                pending.micro_batch = call.micro_batch
            pending.rows += call.rows
            if self.has_input_factor and call.inputs is not None:
                if pending.inputs is None:
                    pending.inputs = call.inputs
                else:
                    pending.inputs += call.inputs
                call.inputs = None
        if gradients is None or self.factor_names[-1] not in self.collected:
            return
        part = self.output_sum(call, gradients)
        key = call.samples
        if sampling_weight is not None:
            key = _SAMPLED
            part.mul_(sampling_weight)
        known = pending.outputs.get(key)
        if known is None:
            pending.outputs[key] = part
        else:
            known += part

    def take_pending(self, loss_scale: float | None, extra_scale: float) -> dict[str, Tensor]:
        """Local sums in the order of `factor_names`, zeros where nothing was seen; resets them.

        Args:
            loss_scale: What one sample's loss was multiplied by before backward; None means one over
                the size of its micro-batch.
            extra_scale: A further factor on every gradient (accumulation, loss scaling).
        """
        pending, self.pending = self.pending, Pending()
        shapes = self.factor_shapes
        output_name = self.factor_names[-1]
        total: Tensor | None = None
        for size, part in pending.outputs.items():
            if size == _SAMPLED or self.options.factor_scale == "kaisa":
                scale = 1.0  # that code line squares the raw gradient of the mean loss
            else:
                scale = (1.0 / size if loss_scale is None else loss_scale) * extra_scale
            part.mul_(1.0 / (scale * scale))
            total = part if total is None else total.add_(part)
        if total is None:
            total = torch.zeros(shapes[output_name], dtype=self.dtype, device=self.device)
        sums = {output_name: total}
        if self.has_input_factor:
            name = self.factor_names[0]
            sums = {
                name: pending.inputs
                if pending.inputs is not None
                else torch.zeros(shapes[name], dtype=self.dtype, device=self.device),
                output_name: total,
            }
        return sums

    @abstractmethod
    def normalizers(self, samples: float, rows: float) -> dict[str, float]:
        """What to divide each global sum by, from global counts."""

    def update_factors(
        self, sums: Mapping[str, Tensor], normalizers: Mapping[str, float], decay: float
    ) -> None:
        """Moves all running averages by one mean each; the sums are consumed."""
        for name, total in sums.items():
            self.update_factor(name, total, normalizers[name], decay)
        self.factor_updates += 1

    def update_factor(self, name: str, total: Tensor, normalizer: float, decay: float) -> None:
        """Moves one running average: `X̄ ← ρ_k X̄ + (1 − ρ_k) X`, X = total / normalizer (spec 1.1).

        `ρ_k = min(1 − 1/k, ρ)` with k counting factor updates from 1, or ρ throughout with
        `ema_init="identity"`.
        """
        weight = decay
        if self.options.ema_init == "first":
            weight = min(1.0 - 1.0 / (self.factor_updates + 1), decay)
        known = self.factors.get(name)
        if known is None and self.options.ema_init == "identity":
            known = self._initial(name)
        if known is None or weight == 0.0:
            self.factors[name] = total.div_(normalizer)
        else:
            self.factors[name] = known.mul_(weight).add_(total, alpha=(1.0 - weight) / normalizer)

    def _initial(self, name: str) -> Tensor:
        shape = self.factor_shapes[name]
        if self.is_diagonal(name):
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        eye = torch.eye(shape[-1], dtype=self.dtype, device=self.device)
        return eye.expand(shape).clone()

    def is_diagonal(self, name: str) -> bool:
        """Whether a factor is stored as its diagonal."""
        return False

    # -- second order --------------------------------------------------------------------------

    @abstractmethod
    def decompose(self, names: tuple[str, ...], damping: float) -> dict[str, Tensor]:
        """New decompositions of the named factors.

        Raises:
            NumericalError: If every fallback failed; the caller keeps the previous one.
        """

    @abstractmethod
    def precondition(self, gradient: Tensor, damping: float) -> Tensor:
        """P from D with the decomposition in use."""

    # -- state ---------------------------------------------------------------------------------

    def drop_pending(self) -> None:
        """Forgets sums that were not used."""
        self.pending = Pending()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises StateError unless the saved tensors have this layer's shapes."""
        for kind, expected in (
            ("factors", self.factor_shapes),
            ("second_order", self.second_order_shapes),
        ):
            saved = {name: tuple(tensor.shape) for name, tensor in state[kind].items()}
            if saved and saved != {n: tuple(s) for n, s in expected.items()}:
                raise StateError(
                    f"saved {kind} of layer {self.name} have other shapes",
                    given=saved,
                    allowed=dict(expected),
                )

    def placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of saved tensors where this layer computes."""
        return {
            name: tensor.detach().to(self.device, self.dtype, copy=True)
            for name, tensor in tensors.items()
        }

    # -- gradients -----------------------------------------------------------------------------

    @abstractmethod
    def gradient(self, weight_decay: float = 0.0) -> Tensor:
        """D in the layer's matrix layout, plus `weight_decay` times the weight.

        Biases, scales and shifts are never decayed ("no weight decay for Batch Norm layer").
        """

    @abstractmethod
    def set_gradient(self, value: Tensor) -> None:
        """Writes P into `.grad`."""
