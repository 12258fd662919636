"""The reproducible mode: every bit of a run is the same for any number of ranks.

Each global batch has V logical shards, whose sizes depend on nothing but the batch and V. A shard is
one forward and backward pass with a random seed of its own; its gradients, its normalisation
statistics, its counters and its K-FAC statistics are one leaf of the summation tree
(`communication/summation_tree.py`). Losses are sums; the division by the number of samples comes
after the tree.

Equal bits are promised for one machine type, torch build, number of threads and memory format: kernels
round differently otherwise. They are saved with the state, and another one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.summation_tree import (
    PartialSums,
    exchange_partials,
    shard_range,
    shards_of_rank,
)
from elastic_kfac.config import ElasticConfig
from elastic_kfac.errors import StateError
from elastic_kfac.state.identity import machine_type
from elastic_kfac.training.sync.exchange import Exchange, Totals

if TYPE_CHECKING:
    from elastic_kfac.kfac.distribution.tree import StatisticsLayout
    from elastic_kfac.kfac.kfac import KFAC

_NAMES = {
    "logical_shards": "elastic.logical_shards",
    "threads": "number of threads (train.torch_threads)",
    "memory_format": "memory format of the weights",
    "machine": "machine type",
    "torch": "torch build",
}


def conditions(model: nn.Module, device: torch.device, num_shards: int) -> dict[str, Any]:
    """What the bits of a run depend on beside its configuration and data."""
    weights = [p for p in model.parameters() if p.dim() == 4]
    strided = [not p.is_contiguous() for p in weights]
    return {
        "logical_shards": num_shards,
        "threads": torch.get_num_threads(),
        "memory_format": "channels_last" if any(strided) else "contiguous",
        "machine": machine_type(device),
        "torch": torch.__version__,
    }


def check_conditions(saved: Mapping[str, Any] | None, own: Mapping[str, Any]) -> None:
    """Refuses to go on where bits would differ.

    Raises:
        StateError: With the first reason.
    """
    change = "go on under the saved conditions, or set elastic.reproducible=false"
    if saved is None:
        raise StateError(
            "the checkpoint was not written in the reproducible mode, so its bits depend on the "
            "world sizes it has seen",
            change="set elastic.reproducible=false, or start a run under another name",
        )
    for key, name in _NAMES.items():
        if saved.get(key) != own[key]:
            raise StateError(
                f"elastic.reproducible: the {name} is not the one of the checkpoint",
                given=own[key],
                allowed=saved.get(key),
                change=change,
            )


def agree_on_conditions(communicator: Communicator, own: Mapping[str, Any]) -> None:
    """Refuses a world of unlike ranks. Collective.

    Raises:
        StateError: On every rank alike, with the first difference.
    """
    everybody: Sequence[Mapping[str, Any]] = communicator.all_gather_object(
        dict(own), tag="conditions"
    )
    for rank, other in enumerate(everybody):
        for key, name in _NAMES.items():
            if other[key] != everybody[0][key]:
                raise StateError(
                    f"elastic.reproducible: the {name} of rank {rank} is not the one of rank 0",
                    given=other[key],
                    allowed=everybody[0][key],
                    change="use machines of one type, or set elastic.reproducible=false",
                )


class ReproducibleExchange(Exchange):
    """The flat vector of a model as a leaf of the summation tree, once per logical shard.

    [gradients | running statistics x count | used flags | totals | K-FAC's statistics where due]
    """

    def __init__(self, model: nn.Module, num_shards: int) -> None:
        super().__init__(model)
        self.num_shards = num_shards
        self._kfac: KFAC | None = None
        self._layout: StatisticsLayout | None = None
        self._partials: PartialSums | None = None
        self._global_count = 0

    def loss_divisor(self, global_count: int) -> int:
        """One: dividing first would round what the tree adds."""
        return 1

    def share(self, first: int, count: int, rank: int, world_size: int) -> tuple[int, int]:
        """(first position, count) of the samples in a rank's shards of a batch."""
        shards = shards_of_rank(rank, world_size, self.num_shards)
        ends = [*shards, shards.stop]
        begins = [min(shard_range(count, self.num_shards, shard)[0], count) for shard in ends]
        return first + begins[0], begins[-1] - begins[0]

    def shards(
        self, communicator: Communicator, kfac: KFAC | None, global_count: int
    ) -> Iterator[tuple[int, slice]]:
        """Goes through this rank's shards of a batch: (shard, where its samples are in the share).

        Shards without samples are pushed here; the others by `end_shard`.
        """
        self._global_count = global_count
        if self._partials is None or kfac is not self._kfac:
            self._prepare(kfac)
        assert self._partials is not None
        partials = self._partials
        partials.restart(self.flat.numel() + self._statistics_size())
        begin = 0
        for shard in shards_of_rank(communicator.rank, communicator.world_size, self.num_shards):
            _, count = shard_range(global_count, self.num_shards, shard)
            if count:
                yield shard, slice(begin, begin + count)
                begin += count
            else:
                partials.push(shard, None)

    def _prepare(self, kfac: KFAC | None) -> None:
        self._kfac, self._layout = kfac, None
        capacity = self.flat.numel()
        if kfac is not None:
            from elastic_kfac.kfac.distribution.tree import StatisticsLayout

            self._layout = StatisticsLayout(kfac.layers)
            capacity += self._layout.size
        dtype, device = self.flat.dtype, self.flat.device
        self._partials = PartialSums(capacity, dtype=dtype, device=device)

    def carries_statistics(self) -> bool:
        """Whether K-FAC's statistics travel in this step."""
        return self._statistics_size() > 0

    def _statistics_size(self) -> int:
        if self._kfac is None or self._layout is None or not self._kfac.factors_due():
            return 0
        return self._layout.size

    def end_shard(self, shard: int, totals: Totals, loss_scale: float) -> None:
        """Makes a leaf of what the passes since `begin_pass` left in the model."""
        assert self._partials is not None
        leaf = self._partials.buffer()
        gradients, sums, counters = self._parts(leaf)
        used = [parameter.grad is not None for parameter in self._parameters]
        for parameter, view in zip(self._parameters, gradients, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
                parameter.grad = None
        for view in sums:
            view.zero_()
        self.statistics.collect(sums, totals.count)
        self._write_counters(counters, used, totals)
        if self._statistics_size():
            assert self._kfac is not None and self._layout is not None
            statistics = self._kfac.take_statistics(totals.count, loss_scale)
            size = self.flat.numel()
            self._layout.pack(statistics, leaf[size : size + self._layout.size])
        self._partials.push(shard, leaf)

    def reduce(
        self,
        communicator: Communicator,
        local: Totals,
        *,
        reduce_gradients: Callable[[Tensor], None] | None = None,
    ) -> Totals:
        """Finishes the tree over all ranks; of `local` only the flags count."""
        assert self._partials is not None and reduce_gradients is None
        size, extra = self.flat.numel(), self._statistics_size()
        flags = torch.tensor([local.stop, local.snapshot]).to(self.flat)
        total, flags = exchange_partials(
            communicator,
            self._partials.partials(),
            flags,
            size=size + extra,
            num_shards=self.num_shards,
            num_filled=min(self._global_count, self.num_shards),
            tag="gradients",
        )
        self.flat.copy_(total[:size])
        totals = self._read_counters(torch.isfinite(self.flat[self._gradient_part].sum()))
        self.reduced = None
        if extra:
            assert self._layout is not None
            self.reduced = self._layout.unpack(total[size:], totals.count)
        stop, snapshot = flags.tolist()
        return replace(totals, stop=int(stop), snapshot=int(snapshot))


def make_exchange(model: nn.Module, elastic: ElasticConfig) -> Exchange:
    """The flat vector of the configured mode."""
    if elastic.reproducible:
        return ReproducibleExchange(model, elastic.logical_shards)
    return Exchange(model)
