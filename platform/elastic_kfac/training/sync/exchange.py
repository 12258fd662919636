"""One flat vector per step, summed over all ranks: gradients, statistics and counters.

    [gradient of each parameter | running statistics x count | used flags | totals]

The times of ranks take no room, where they are asked for: rank r adds its own, as a fraction, to flag r.
A longer vector would be summed in another order by a ring, and switching the times on would change bits.

From the second pass of a step on, gradients are views of the flat vector; the first pass is added into
it. No object holds a process group, so the step after a resize just uses another communicator. Counters
are stored as floating-point numbers, small enough to be exact in float32 in any order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from elastic_kfac.communication.collectives import Communicator

if TYPE_CHECKING:
    from elastic_kfac.kfac.statistics import Statistics

_LIMBS = 8
_TOTALS = ("loss_sum", "correct", "count", "stop", "snapshot")
_ALIGNMENT = 16
"""In elements. Kernels may round differently on unaligned memory."""
_MARGIN = 2.0**-8


@dataclass(frozen=True)
class Totals:
    """Sums over the samples of a step; `stop` and `snapshot` count the ranks that request it."""

    loss_sum: float = 0.0
    correct: float = 0.0
    count: int = 0
    terms: float = 0.0
    """What the loss is divided by: `count`, or tokens or pixels."""
    stop: int = 0
    snapshot: int = 0
    id_hash: int = 0
    gradients_are_finite: bool = True
    seconds: tuple[float, ...] = ()
    """Of the passes of every rank, where they are asked for; before the sum, of this one."""


class RunningStatistics:
    """Batch statistics of normalisation layers as a count-weighted sum over micro-batches and ranks.

    Running means updated by each rank would depend on the world size and the number of micro-batches.
    Instead, running values are reset to 0 with momentum 1 before each forward pass, so that they hold its
    batch statistics. Those are summed, weighted by samples, and the moving average is updated once per
    step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            module
            for module in model.modules()
            if isinstance(module, _NormBase) and module.running_mean is not None
        ]
        self._saved: list[tuple[float | None, Tensor, Tensor, Tensor | None]] = []

    @property
    def shapes(self) -> list[torch.Size]:
        return [tensor.shape for module in self._modules for tensor in _running(module)]

    def begin_step(self) -> None:
        """Saves the running values, which the passes overwrite."""
        self._saved = []
        for module in self._modules:
            mean, variance = _running(module)
            batches = module.num_batches_tracked
            self._saved.append(
                (
                    module.momentum,
                    mean.clone(),
                    variance.clone(),
                    None if batches is None else batches.clone(),
                )
            )

    def begin_pass(self) -> None:
        """Makes the next forward pass leave its batch statistics in the running values."""
        for module in self._modules:
            module.momentum = 1.0
            for tensor in _running(module):
                tensor.zero_()

    def collect(self, sums: list[Tensor], count: int) -> None:
        """Adds the statistics of the last pass over `count` samples."""
        tensors = (tensor for module in self._modules for tensor in _running(module))
        for total, tensor in zip(sums, tensors, strict=True):
            total.add_(tensor, alpha=count)

    def finish_step(self, sums: list[Tensor], count: int) -> None:
        """Updates the moving averages from the saved values and the reduced sums."""
        self.abandon_step()
        means = iter(sums)
        for module in self._modules:
            if (batches := module.num_batches_tracked) is not None:
                batches.add_(1)
            weight = module.momentum
            if weight is None:
                weight = 1.0 / float(batches) if batches is not None else 0.1
            for tensor in _running(module):
                tensor.mul_(1 - weight).add_(next(means), alpha=weight / count)

    def abandon_step(self) -> None:
        """Restores the saved values."""
        for module, (momentum, mean, variance, batches) in zip(
            self._modules, self._saved, strict=False
        ):
            module.momentum = momentum
            for tensor, old in zip(_running(module), (mean, variance), strict=True):
                tensor.copy_(old)
            if batches is not None and module.num_batches_tracked is not None:
                module.num_batches_tracked.copy_(batches)
        self._saved = []


class Exchange:
    """The flat vector of a model: filled by backward passes, summed over all ranks."""

    def __init__(self, model: nn.Module, *, counts_terms: bool = False) -> None:
        self.counts_terms = counts_terms
        self._totals = (*_TOTALS, "terms") if counts_terms else _TOTALS
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.statistics = RunningStatistics(model)
        dtype = torch.float32
        for parameter in self._parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        device = self._parameters[0].device
        self._shapes = [p.shape for p in self._parameters] + self.statistics.shapes
        self._sizes = [_aligned(shape.numel()) for shape in self._shapes]
        self._gradient_part = slice(0, sum(self._sizes[: len(self._parameters)]))
        counters = len(self._parameters) + len(self._totals) + _LIMBS
        self._size = sum(self._sizes) + counters
        self.flat = torch.zeros(self._size, dtype=dtype, device=device)
        self._gradients, self._sums, self._counters = self._parts(self.flat)
        self.reduced: Statistics | None = None
        """K-FAC's statistics summed over all ranks, if they are sent with the gradients."""
        self._used = [False] * len(self._parameters)
        self._used_anywhere = list(self._used)
        self._timed_ranks = 0

    def _parts(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Views of a flat vector: gradients, statistics of normalisation layers, counters."""
        views = list(_views(flat, self._shapes, self._sizes))
        count = len(self._parameters)
        return views[:count], views[count:], flat[sum(self._sizes) : self._size]

    def time_ranks(self, count: int) -> None:
        """From now on the sum has the times of so many ranks; between two steps."""
        self._timed_ranks = count
        size = self._size + max(0, count - len(self._parameters))
        if self.flat.numel() != size:
            # More ranks than flags.
            self.flat = self.flat.new_zeros(size)
            self._gradients, self._sums, self._counters = self._parts(self.flat)

    def _place_of_time(self, rank: int) -> int:
        flags = len(self._parameters)
        return sum(self._sizes) + rank if rank < flags else self._size + rank - flags

    def loss_divisor(self, global_count: int) -> int:
        """Divisor of the loss (a sum over samples) before the backward pass."""
        return global_count

    def begin_step(self) -> None:
        """Clears the vector and the gradients."""
        self.flat.zero_()
        self.statistics.begin_step()
        self._used = [False] * len(self._parameters)
        for parameter in self._parameters:
            parameter.grad = None

    def begin_pass(self) -> None:
        """Call before each forward pass."""
        self.statistics.begin_pass()

    def end_pass(self, count: int) -> None:
        """Call after each backward pass, over `count` samples."""
        self.statistics.collect(self._sums, count)
        for index, (parameter, view) in enumerate(
            zip(self._parameters, self._gradients, strict=True)
        ):
            if parameter.grad is None:
                continue
            if parameter.grad.data_ptr() != view.data_ptr():
                view.add_(parameter.grad)
                # Later passes accumulate directly into the vector if the dtypes match.
                parameter.grad = view if view.dtype == parameter.dtype else None
            self._used[index] = True

    def reduce(
        self,
        communicator: Communicator,
        local: Totals,
        *,
        reduce_gradients: Callable[[Tensor], None] | None = None,
    ) -> Totals:
        """Sums the vector over all ranks and returns the global totals. Collective.

        Args:
            reduce_gradients: Sums the gradients in place of the all-reduce, or defers their sum; the rest
                of the vector is then summed separately.
        """
        self._write_counters(self._counters, self._used, local)
        if local.seconds:
            self.flat[self._place_of_time(communicator.rank)] += _as_fraction(local.seconds[0])
        gradients = self.flat[self._gradient_part]
        if reduce_gradients is None:
            communicator.all_reduce(self.flat, tag="gradients").wait()
            finite = torch.isfinite(gradients.sum())
        else:
            reduce_gradients(gradients)
            bad = (~torch.isfinite(gradients.sum())).to(self.flat).view(1)
            rest = torch.cat([self.flat[self._gradient_part.stop :], bad])
            communicator.all_reduce(rest, tag="totals").wait()
            self.flat[self._gradient_part.stop :] = rest[:-1]
            finite = rest[-1] == 0
        return self._read_counters(finite)

    def _write_counters(self, counters: Tensor, used: list[bool], local: Totals) -> None:
        values = [float(getattr(local, name)) for name in self._totals]
        # Eight bits per limb, so the sum over up to 65,536 ranks is exact in float32.
        limbs = [float((local.id_hash >> (8 * index)) & 0xFF) for index in range(_LIMBS)]
        content = [*map(float, used), *values, *limbs]
        counters.copy_(torch.tensor(content, dtype=counters.dtype))

    def _read_counters(self, finite: Tensor) -> Totals:
        # One device-to-host transfer for all values.
        everything = self.flat[sum(self._sizes) :]
        *reduced, is_finite = torch.cat([everything, finite.to(self.flat).view(1)]).tolist()
        begin, used = sum(self._sizes), len(self._parameters)
        places = [self._place_of_time(rank) - begin for rank in range(self._timed_ranks)]
        seconds = [_from_fraction(reduced[place] % 1) for place in places]
        reduced = reduced[: self._size - begin]
        self._used_anywhere = [value >= 1 for value in reduced[:used]]
        named = dict(zip(self._totals, reduced[used:], strict=False))
        id_hash = sum(int(limb) << (8 * index) for index, limb in enumerate(reduced[-_LIMBS:]))
        return Totals(
            loss_sum=named["loss_sum"],
            correct=named["correct"],
            count=int(named["count"]),
            terms=named.get("terms", named["count"]),
            stop=int(named["stop"]),
            snapshot=int(named["snapshot"]),
            id_hash=id_hash % 2**64,
            gradients_are_finite=bool(is_finite),
            seconds=tuple(seconds),
        )

    def local_gradient(self, count: int) -> Tensor:
        """This rank's gradient averaged over `count` samples, as one flat vector."""
        return torch.cat([view.reshape(-1) for view in self._gradients]).div_(max(count, 1))

    def publish_gradients(self, loss_scale: float = 1.0) -> None:
        """Sets `.grad` to the reduced gradients divided by `loss_scale`.

        A parameter that no rank used gets None, as after an ordinary backward pass.
        """
        if loss_scale != 1.0:
            self.flat[self._gradient_part].div_(loss_scale)
        for used, parameter, view in zip(
            self._used_anywhere, self._parameters, self._gradients, strict=True
        ):
            parameter.grad = view.to(parameter.dtype) if used else None

    def finish_step(self, count: int) -> None:
        """Updates the moving averages of the normalisation layers."""
        self.statistics.finish_step(self._sums, count)

    def abandon_step(self) -> None:
        """Undoes the changes of a failed step to the model."""
        self.statistics.abandon_step()
        for parameter in self._parameters:
            parameter.grad = None


def _as_fraction(seconds: float) -> float:
    """A time between 1 µs and 12 days as a number between 0 and 1, so far from both that sums of
    thousands of flags keep it to half a percent."""
    octaves = math.log2(max(seconds, 2.0**-20)) + 20
    return min(max(octaves / 40, _MARGIN), 1 - _MARGIN)


def _from_fraction(fraction: float) -> float:
    return float(2.0 ** (40 * fraction - 20))


def _running(module: _NormBase) -> tuple[Tensor, Tensor]:
    assert module.running_mean is not None and module.running_var is not None
    return module.running_mean, module.running_var


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _views(flat: Tensor, shapes: list[torch.Size], sizes: list[int]) -> Iterator[Tensor]:
    offset = 0
    for shape, size in zip(shapes, sizes, strict=True):
        yield flat[offset : offset + shape.numel()].view(shape)
        offset += size
