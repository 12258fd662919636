"""Hessian-vector products of the mean loss over samples in chunks on any number of ranks.

Products do not depend on chunks or ranks: every sample has the same weight, the model is in evaluation
mode (BatchNorm does not couple samples, and no running statistic moves), and one sum over ranks
gives every rank the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.data.batch import Value
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.tasks.models import call_model, evaluating
from elastic_kfac.tasks.task import SumLoss

Batch = tuple[Value, Value]
"""(inputs, targets), samples first."""

_Rows = tuple[Tensor, Sequence[Tensor | None]]
"""The loss of a chunk and its summed derivative for each parameter (None is zero)."""

SOLO = Communicator.solo()
"""A world of one rank."""


class Operator(Protocol):
    """A symmetric linear map of flat vectors [size]."""

    @property
    def size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def expired(self) -> bool:
        """Whether the time budget is spent; equal on every rank after a product."""
        ...

    def product(self, vector: Tensor) -> Tensor:
        """The image of `vector`."""
        ...


def last_layer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of the last registered layer with a weight matrix.

    Raises:
        UsageError: If there is no such layer.
    """
    found: list[nn.Parameter] = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if any(p.dim() > 1 for p in own):
            found = own
    if not found:
        raise UsageError("the model has no trainable layer with a weight matrix")
    return found


def check_request(
    parameters: Sequence[nn.Parameter], *, vectors: int, limit_bytes: float | None
) -> int:
    """Bytes of `vectors` vectors over `parameters`.

    A spectrum of k eigenvectors keeps k + 3 vectors, a Lanczos run of s steps s + 3.

    Raises:
        ConfigError: If they are more than `limit_bytes`.
    """
    needed = vectors * sum(p.numel() * p.element_size() for p in parameters)
    if limit_bytes is not None and needed > limit_bytes:
        raise ConfigError(
            "the Hessian analysis does not fit in memory",
            given=f"{vectors} vectors of the parameters, {needed / 2**20:.0f} MiB",
            allowed=f"{limit_bytes / 2**20:.0f} MiB",
            change="ask for fewer eigenvalues or Lanczos steps, or for the last layer only",
        )
    return needed


@dataclass(frozen=True)
class LossAndGradient:
    """Mean loss and its gradient over all samples of all ranks."""

    loss: float
    gradient: Tensor
    """[size]."""
    count: int

    @property
    def norm(self) -> float:
        """Euclidean norm of the whole gradient."""
        return float(torch.linalg.vector_norm(self.gradient))


class Hessian:
    """The Hessian of the mean loss with respect to a choice of parameters, as an `Operator`.

    Products are collective: every rank calls them with the same vector, also a rank without samples.

    Args:
        model: In any mode; modes are restored after each product.
        batches: This rank's samples in chunks, iterated once per product.
        parameters: The block to differentiate; None takes all trainable parameters.
        communicator: The ranks that have samples.
        tag: Name of the counted traffic.
        time_budget_s: Counted from the first product; a started product is finished.
        terms: What the loss of some targets is a sum over, for the mean; samples by default.

    Raises:
        UsageError: If `batches` can be iterated only once, or no parameter is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_sum: SumLoss,
        batches: Iterable[Batch],
        *,
        parameters: Sequence[nn.Parameter] | None = None,
        communicator: Communicator = SOLO,
        tag: str = "hessian",
        time_budget_s: float | None = None,
        terms: Callable[[Value], int] = len,
    ) -> None:
        if iter(batches) is batches:
            raise UsageError(
                "Hessian products iterate over the samples many times",
                given=type(batches).__name__,
                change="pass a list, or an iterable that starts over each time",
            )
        chosen = list(model.parameters()) if parameters is None else list(parameters)
        self.parameters = [p for p in chosen if p.requires_grad]
        if not self.parameters:
            raise UsageError("a Hessian needs at least one trainable parameter")
        self.model = model
        self.products = 0
        """Products so far: each costs two to three backward passes over the samples."""
        self._loss_sum, self._terms = loss_sum, terms
        self._batches = batches
        self._communicator, self._tag = communicator, tag
        self._time_budget_s = time_budget_s
        self._began: float | None = None
        self._expired = False
        self._is_one_chunk = isinstance(batches, Sequence) and len(batches) == 1
        self._kept: tuple[list[int], Tensor, Sequence[Tensor | None]] | None = None
        self._sizes = [p.numel() for p in self.parameters]
        self._dtype = self.parameters[0].dtype
        for parameter in self.parameters:
            self._dtype = torch.promote_types(self._dtype, parameter.dtype)

    @property
    def size(self) -> int:
        return sum(self._sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def expired(self) -> bool:
        return self._expired

    def product(self, vector: Tensor) -> Tensor:
        """Hv = ∇(∇L·v), the mean over samples [size] (Pearlmutter 1994)."""
        directions = self.split(vector)

        def rows(inputs: Value, labels: Value) -> _Rows:
            loss, gradients = self._differentiable_gradients(inputs, labels)
            terms = [
                (gradient * direction).sum()
                for gradient, direction in zip(gradients, directions, strict=True)
                if gradient is not None and gradient.requires_grad
            ]
            if not terms:
                return loss, [None] * len(self.parameters)
            return loss, torch.autograd.grad(
                torch.stack(terms).sum(),
                self.parameters,
                allow_unused=True,
                retain_graph=self._is_one_chunk,
            )

        self.products += 1
        return self._mean_over_samples(rows).gradient

    def gradient(self) -> LossAndGradient:
        """The mean loss and its gradient; collective like a product."""

        def rows(inputs: Value, labels: Value) -> _Rows:
            loss = self._loss_sum(call_model(self.model, inputs), labels)
            return loss, torch.autograd.grad(loss, self.parameters, allow_unused=True)

        return self._mean_over_samples(rows)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a flat vector in the shapes and types of the parameters."""
        parts = vector.split(self._sizes)
        return [
            part.view(p.shape).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)
        ]

    def _differentiable_gradients(
        self, inputs: Value, labels: Value
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The loss of a chunk and its gradients, with the graph for the second derivative.

        The graph of a lone chunk is reused for all products at the same point, which saves two of
        five passes.
        """
        point = [t._version for t in (*self.model.parameters(), *self.model.buffers())]
        if self._kept is None or self._kept[0] != point:
            loss = self._loss_sum(call_model(self.model, inputs), labels)
            gradients = torch.autograd.grad(
                loss, self.parameters, create_graph=True, allow_unused=True
            )
            if not self._is_one_chunk:
                return loss, gradients
            self._kept = point, loss, gradients
        return self._kept[1:]

    def _mean_over_samples(self, rows: Callable[[Tensor, Tensor], _Rows]) -> LossAndGradient:
        if self._began is None:
            self._began = time.monotonic()
        total = torch.zeros(self.size, dtype=self._dtype, device=self.device)
        # Double precision holds every sample count exactly.
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        # Fused attention kernels have no second derivative.
        with evaluating(self.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for inputs, labels in self._batches:
                if not len(labels):
                    continue
                loss, found = rows(inputs, labels)
                for part, row in zip(total.split(self._sizes), found, strict=True):
                    if row is not None:
                        part.add_(row.detach().reshape(-1))
                totals[0] += loss.detach()
                totals[1] += self._terms(labels)
        if self._time_budget_s is not None:
            totals[2] += time.monotonic() - self._began > self._time_budget_s
        self._communicator.all_reduce(totals, tag=self._tag)
        self._communicator.all_reduce(total, tag=self._tag)
        loss_sum, count, expired = totals.tolist()
        if count == 0:
            raise UsageError("the Hessian analysis has no samples on any rank")
        self._expired = self._expired or expired > 0
        return LossAndGradient(loss_sum / count, total.div_(count), int(count))
