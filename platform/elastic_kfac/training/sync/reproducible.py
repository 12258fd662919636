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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.summation_tree import (
    PartialSums,
    exchange_partials,
    shard_range,
    shards_of_ranks,
)
from elastic_kfac.data.batch import Batch
from elastic_kfac.data.order import id_hash
from elastic_kfac.errors import StateError
from elastic_kfac.placement.shares import shares
from elastic_kfac.state.identity import machine_type
from elastic_kfac.training.sync.exchange import Exchange, Totals
from elastic_kfac.training.sync.synchronisation import Passes, Span, Synchronisation

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
    """Everything except configuration and data on which the bits of a run depend."""
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
    """Checks that a run can continue bit for bit from a checkpoint.

    Raises:
        StateError: For the first condition that differs.
    """
    change = "continue under the saved conditions, or set elastic.reproducible=false"
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


class ShardVector(Exchange):
    """The flat vector of a model as a leaf of the summation tree, once per logical shard.

    [gradients | running statistics x count | used flags | totals | K-FAC's statistics where due]
    """

    def __init__(self, model: nn.Module, num_shards: int, *, counts_terms: bool = False) -> None:
        super().__init__(model, counts_terms=counts_terms)
        self.num_shards = num_shards
        self._kfac: KFAC | None = None
        self._layout: StatisticsLayout | None = None
        self._partials: PartialSums | None = None
        self._global_count = 0
        self.ranges = [range(num_shards)]
        """The logical shards of every rank."""
        self._times_with_flags = 0

    def time_ranks(self, count: int) -> None:
        self._times_with_flags = count  # leaves have no rank

    def begin(self, kfac: KFAC | None, global_count: int) -> None:
        """Starts the tree of a batch."""
        self._global_count = global_count
        if self._partials is None or kfac is not self._kfac:
            self._prepare(kfac)
        assert self._partials is not None
        self._layout = None
        if kfac is not None and kfac.factors_due():
            from elastic_kfac.kfac.distribution.tree import StatisticsLayout

            self._layout = StatisticsLayout(kfac.layers, kfac.due)
        self._partials.restart(self.flat.numel() + self.statistics_size())

    def _prepare(self, kfac: KFAC | None) -> None:
        self._kfac = kfac
        capacity = self.flat.numel()
        if kfac is not None:
            from elastic_kfac.kfac.distribution.tree import StatisticsLayout

            capacity += StatisticsLayout(kfac.layers).size
        dtype, device = self.flat.dtype, self.flat.device
        self._partials = PartialSums(capacity, dtype=dtype, device=device)

    def statistics_size(self) -> int:
        """Elements of K-FAC's statistics in this step."""
        return 0 if self._layout is None else self._layout.size

    def push_empty(self, shard: int) -> None:
        """Adds the leaf of a shard without samples."""
        assert self._partials is not None
        self._partials.push(shard, None)

    def push(self, shard: int, totals: Totals, loss_scale: float) -> None:
        """Makes a leaf of what the passes since `begin_pass` left in the model."""
        assert self._partials is not None
        leaf = self._partials.buffer()
        gradients, sums, counters = self._parts(leaf)
        if self.statistics_size():
            # While the gradients that they belong to are still there.
            assert self._kfac is not None and self._layout is not None
            statistics = self._kfac.take_statistics(
                None if self.counts_terms else totals.count, loss_scale
            )
            size = self.flat.numel()
            self._layout.pack(statistics, leaf[size : size + self._layout.size])
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
        size, extra = self.flat.numel(), self.statistics_size()
        times = [0.0] * self._times_with_flags
        if local.seconds:
            times[communicator.rank] = local.seconds[0]
        flags = torch.tensor([local.stop, local.snapshot, *times]).to(self.flat)
        total, flags = exchange_partials(
            communicator,
            self._partials.partials(),
            flags,
            size=size + extra,
            num_shards=self.num_shards,
            num_filled=min(self._global_count, self.num_shards),
            tag="gradients",
            ranges=self.ranges,
        )
        self.flat.copy_(total[:size])
        totals = self._read_counters(torch.isfinite(self.flat[self._gradient_part].sum()))
        self.reduced = None
        if extra:
            assert self._layout is not None
            self.reduced = self._layout.unpack(total[size:], totals.terms)
        stop, snapshot, *times = flags.tolist()
        return replace(totals, stop=int(stop), snapshot=int(snapshot), seconds=tuple(times))


class CanonicalTree(Synchronisation):
    r"""Every bit of a run is the same for any number of ranks.

    shards   0   1   2   3   4   5   6   7      of every batch, however many ranks there are
              \ /     \ /     \ /     \ /       each rank adds the subtrees it has whole,
                \     /         \     /          one exchange completes the others
                   \______ ______/
                           Σ                   gradients | BatchNorm | counters | K-FAC statistics
    """

    part = "reproducible"
    evaluates_whole_batches = True

    vector: ShardVector

    def __init__(self, model: nn.Module, num_shards: int, *, counts_terms: bool = False) -> None:
        super().__init__(ShardVector(model, num_shards, counts_terms=counts_terms))
        self._model, self._num_shards = model, num_shards

    def join(self, communicator: Communicator, kfac: KFAC | None) -> None:
        super().join(communicator, kfac)
        if communicator.world_size > 1:
            agree_on_conditions(communicator, self.state_dict())

    def share(self, speeds: Sequence[float]) -> None:
        super().share(speeds)
        if self.speeds:
            self.vector.ranges = shares(self._num_shards, self.speeds)
        else:
            self.vector.ranges = shards_of_ranks(self.communicator.world_size, self._num_shards)

    @property
    def holds_everything(self) -> bool:
        return True

    def loss_divisor(self, count: int) -> int:
        return 1  # dividing first would round what the tree adds

    def slice(self, first: int, count: int) -> tuple[int, int]:
        shards = self.vector.ranges[self.communicator.rank]
        ends = [*shards, shards.stop]
        begins = [min(shard_range(count, self._num_shards, shard)[0], count) for shard in ends]
        return first + begins[0], begins[-1] - begins[0]

    def share_sizes(self, count: int) -> list[int]:
        sizes = [
            shard_range(count, self._num_shards, shard)[1] for shard in range(self._num_shards)
        ]
        return [sum(sizes[own.start : own.stop]) for own in self.vector.ranges]

    def accumulate(
        self, passes: Passes, samples: Batch | None, span: Span, loss_scale: float
    ) -> Totals:
        self.vector.begin_step()
        self.vector.begin(self.kfac, span.count)
        begin = 0
        for shard in self.vector.ranges[self.communicator.rank]:
            _, count = shard_range(span.count, self._num_shards, shard)
            if not count:
                self.vector.push_empty(shard)
                continue
            assert samples is not None
            part = slice(begin, begin + count)
            begin += count
            inputs = passes.inputs(samples.part(part), span)
            passes.seed(span.step, shard)
            self.vector.begin_pass()
            loss = right = terms = 0.0
            if len(inputs.targets):
                # Clones, because kernels may round differently on memory that begins elsewhere.
                passed = passes.backward(
                    inputs.inputs.clone(), inputs.targets.clone(), loss_scale, self.kfac
                )
                loss, right, terms = float(passed.loss), float(passed.correct), passed.terms
            hashed = id_hash(samples.ids[part])
            totals = Totals(loss, right, len(inputs.targets), terms, id_hash=hashed)
            self.vector.push(shard, totals, loss_scale)
        return Totals()

    @property
    def carries_statistics(self) -> bool:
        return self.vector.statistics_size() > 0

    def reduce(self, local: Totals, step: int) -> Totals:
        return self.vector.reduce(self.communicator, local)

    def state_dict(self) -> dict[str, Any]:
        """The conditions under which bits are equal."""
        device = self.vector.flat.device
        return conditions(self._model, device, self._num_shards)

    def load_state_dict(self, state: Any) -> None:
        check_conditions(state, self.state_dict())
