"""Batch normalisation over the samples of a group of ranks, on any backend.

torch's own SyncBatchNorm needs a GPU. This one gives, on every rank, what one process gives on the
concatenated batch, for shares of any size: a rank without samples takes part with an empty batch.
Synchronised over all ranks, with one pass per step, the result does not depend on the world size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import ConfigError, UsageError

_TAG = "sync_batch_norm"


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d, 2d and 3d whose training statistics are those of `communicator`'s ranks together.

    All of its ranks run the same number of forward and backward passes. Parameters and buffers have
    BatchNorm's names, so checkpoints fit both. `communicator` is replaced after a resize.
    """

    communicator: Communicator = Communicator.solo()
    shared_statistics: tuple[Tensor, Tensor] | None = None
    """(mean, 1/σ) of the newest training pass over the group; K-FAC needs what the inputs became."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise UsageError(
                "SyncBatchNorm needs a batch of at least 2 dimensions", given=input.dim()
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalises [n, channels, ...]; updates running values in training mode."""
        self.shared_statistics = None
        use_batch = self.training or self.running_mean is None
        if not use_batch or self.communicator.world_size == 1:
            return super().forward(input)
        self._check_input_dim(input)
        total, mean, variance = _group_statistics(input, self.communicator)
        if total <= 1:
            raise UsageError(
                "batch normalisation needs more than one value per channel in its group",
                given=int(total),
            )
        if self.training and self.running_mean is not None:
            self._move_running_values(mean, variance * (total / (total - 1)))
        scale = (variance + self.eps).rsqrt()
        self.shared_statistics = (mean, scale)
        output: Tensor = _Normalize.apply(
            input, self.weight, self.bias, mean, scale, total, self.communicator
        )
        return output

    @torch.no_grad()
    def _move_running_values(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:
                share = 1.0 / float(self.num_batches_tracked)
        weight = 0.0 if share is None else share
        self.running_mean.lerp_(mean.to(self.running_mean), weight)
        self.running_var.lerp_(variance.to(self.running_var), weight)


class _Normalize(torch.autograd.Function):
    """γ(x − μ)/σ + β, with the gradient through the group's μ and σ."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        total: float,
        communicator: Communicator,
    ) -> Tensor:
        shape = _per_channel(x)
        normalized = (x.to(scale.dtype) - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normalized, weight, scale)
        ctx.total, ctx.communicator, ctx.dtype = total, communicator, x.dtype
        output = normalized
        if weight is not None:
            output = output * weight.to(scale.dtype).view(shape)
        if bias is not None:
            output = output + bias.to(scale.dtype).view(shape)
        return output.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normalized, weight, scale = ctx.saved_tensors
        shape = _per_channel(normalized)
        gradient = gradient.to(scale.dtype)
        axes = _all_but_channels(normalized)
        sums = torch.stack((gradient.sum(axes), (gradient * normalized).sum(axes)))
        own = sums.clone()
        ctx.communicator.all_reduce(sums, tag=_TAG).wait()
        means = sums / ctx.total
        inner = gradient - means[0].view(shape) - normalized * means[1].view(shape)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        of_input = (inner * factor.view(shape)).to(ctx.dtype)
        # Parameter gradients are local sums: the step's own exchange adds them over ranks.
        of_weight = None if weight is None else own[1].to(weight.dtype)
        of_bias = own[0].to(ctx.dtype if weight is None else weight.dtype)
        return (
            of_input,
            of_weight,
            of_bias if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
            None,
        )


def _group_statistics(x: Tensor, communicator: Communicator) -> tuple[float, Tensor, Tensor]:
    """(values per channel, mean, biased variance) over all ranks, without gradients.

    Means and squared deviations of the ranks are combined (Chan et al. 1979): a difference of second
    moments would lose the digits of a small variance.
    """
    with torch.no_grad():
        wide = x.detach().double()
        axes = _all_but_channels(x)
        count = x.numel() // x.shape[1] if x.shape[1] else 0
        mean = wide.sum(axes) / max(count, 1)
        spread = (wide - mean.view(_per_channel(x))).square().sum(axes)
        own = torch.cat((mean, spread, mean.new_tensor([float(count)])))
        gathered = torch.stack(communicator.all_gather(own, tag=_TAG))
        channels = x.shape[1]
        means, spreads = gathered[:, :channels], gathered[:, channels : 2 * channels]
        counts = gathered[:, -1:]
        total = float(counts.sum())
        mean = (means * counts).sum(0) / max(total, 1.0)
        spread = spreads.sum(0) + (counts * (means - mean).square()).sum(0)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return total, mean.to(dtype), (spread / max(total, 1.0)).to(dtype)


def _per_channel(x: Tensor) -> list[int]:
    return [1, x.shape[1], *[1] * (x.dim() - 2)]


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def statistics_group(communicator: Communicator, group_size: int | None) -> Communicator:
    """The group of `group_size` consecutive ranks that this rank is in; None is all of them.

    Collective over `communicator`. The last group is smaller where the world is not a multiple.

    Raises:
        ConfigError: If the size is not positive.
    """
    if group_size is not None and group_size < 1:
        raise ConfigError("the group size of SyncBatchNorm must be positive", given=group_size)
    if group_size is None or group_size >= communicator.world_size:
        return communicator
    own = Communicator.solo()
    if group_size > 1:
        for first in range(0, communicator.world_size, group_size):
            ranks = range(first, min(first + group_size, communicator.world_size))
            found = communicator.subgroup(ranks)
            own = own if found is None else found
    return own


def synchronise_batch_norm(
    model: nn.Module, communicator: Communicator, *, group_size: int | None = None
) -> nn.Module:
    """Replaces every BatchNorm of `model` by a synchronised one, or moves those it has to
    `communicator` after a resize. Collective over `communicator`.

    Parameters and buffers stay the same objects. Returns the model, which is another object only if
    it is a BatchNorm itself.

    Raises:
        ConfigError: If the group size is not positive.
    """
    group = statistics_group(communicator, group_size)
    if type(model) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        model = _converted(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                setattr(module, name, _converted(child))
    for module in model.modules():
        if isinstance(module, SyncBatchNorm):
            module.communicator = group
    return model


def _converted(module: nn.Module) -> SyncBatchNorm:
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    result = SyncBatchNorm(
        module.num_features,
        eps=module.eps,
        momentum=module.momentum,
        affine=module.affine,
        track_running_stats=module.track_running_stats,
    )
    result.weight, result.bias = module.weight, module.bias
    result.running_mean, result.running_var = module.running_mean, module.running_var
    result.num_batches_tracked = module.num_batches_tracked
    result.training = module.training
    return result
