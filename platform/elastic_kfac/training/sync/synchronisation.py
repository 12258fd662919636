"""How the ranks of a run keep one model: the interface of the modes.

    mode                 what travels in a step, and between whom
    GlobalSum            one flat vector, summed over all ranks (optionally compressed, ring or tree)
    CanonicalTree        the same vector per logical shard, added in one order for any number of ranks
    ShardedByOwner       counters only; gradients go to the owners of their layers inside `KFAC.step`
    LocalSteps           counters only; parameters and momenta are merged every k steps

A strategy owns the flat vector and lives as long as its trainer; `join` moves it to other ranks.
`make_synchronisation` chooses one from the configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.data.batch import Batch, Value
from elastic_kfac.data.dataset import rank_slice
from elastic_kfac.placement.shares import shares
from elastic_kfac.training.sync.exchange import Exchange, Totals

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC
    from elastic_kfac.kfac.statistics import Statistics
    from elastic_kfac.placement.simulator import RankSpeed


@dataclass(frozen=True)
class Span:
    """The batch of one step as positions of its epoch's order, and this rank's slice of it."""

    step: int
    """Committed steps before this one."""
    epoch: int
    first: int
    count: int
    own_first: int
    own_count: int
    attacked_fraction: float = 0.0
    """γ: share of each logical micro-batch that is attacked."""


class Passed(NamedTuple):
    """Sums over the samples of a pass."""

    loss: Tensor
    """Unscaled."""
    correct: Tensor
    """Terms that were predicted right."""
    terms: int
    """Of the loss: samples, tokens or pixels."""


class Passes(Protocol):
    """Forward and backward passes over samples of this rank."""

    def inputs(self, samples: Batch, span: Span) -> Batch:
        """Samples on the device, attacked, mixed and erased as configured."""
        ...

    def preprocess(self, samples: Batch) -> Batch:
        """Samples on the device as they are."""
        ...

    def no_inputs(self) -> Batch:
        """An empty batch."""
        ...

    def seed(self, step: int, index: int) -> None:
        """Seeds torch as a function of the run's seed, the step and a sample or shard."""
        ...

    @property
    def counts_terms(self) -> bool:
        """Whether the loss is a mean over `Passed.terms` instead of samples."""
        ...

    def backward(
        self, inputs: Value, targets: Value, loss_scale: float, kfac: KFAC | None
    ) -> Passed:
        """Adds the gradient of the scaled loss to `.grad`."""
        ...


class Synchronisation(ABC):
    """One mode. Collective methods are called by all ranks in the same order."""

    part: ClassVar[str | None] = None
    """Name of `state_dict` in the training state."""
    evaluates_whole_batches: ClassVar[bool] = False
    """Whether a split is cut between ranks at batches only, so that each has the same samples in every
    world."""

    def __init__(self, vector: Exchange) -> None:
        self.vector = vector
        self.communicator = Communicator.solo()
        self.kfac: KFAC | None = None
        self.speeds: list[float] = []
        """Of all ranks at passes, where they get unequal shares; else empty."""

    def join(self, communicator: Communicator, kfac: KFAC | None) -> None:
        """Works with these ranks and their preconditioner from now on. Collective."""
        self.communicator, self.kfac = communicator, kfac
        speeds: Sequence[RankSpeed] = ()
        if kfac is not None and kfac.calibration is not None:
            speeds = kfac.calibration.speeds_of(communicator.world_size)
        self.share([speed.passes for speed in speeds])

    def share(self, speeds: Sequence[float]) -> None:
        """Cuts batches by the speeds of all ranks from now on; equal ones, or none, for equal shares."""
        self.speeds = list(speeds) if len(set(speeds)) > 1 else []

    def close(self) -> None:
        """Drops every reference to the present ranks."""
        self.communicator, self.kfac = Communicator.solo(), None

    @property
    @abstractmethod
    def holds_everything(self) -> bool:
        """Whether each rank alone has all of the mode's state."""

    # -- one step, in this order --------------------------------------------------------------

    def slice(self, first: int, count: int) -> tuple[int, int]:
        """(first position, count) of this rank's slice of a batch."""
        if self.speeds:
            own = shares(count, self.speeds)[self.communicator.rank]
            return first + own.start, len(own)
        return rank_slice(first, count, self.communicator.rank, self.communicator.world_size)

    def share_sizes(self, count: int) -> list[int]:
        """Samples of a batch by rank."""
        if self.speeds:
            return [len(part) for part in shares(count, self.speeds)]
        world_size = self.communicator.world_size
        return [rank_slice(0, count, rank, world_size)[1] for rank in range(world_size)]

    def loss_divisor(self, count: int) -> int:
        """What losses, sums over samples, are divided by before the backward pass."""
        return count

    @abstractmethod
    def accumulate(
        self, passes: Passes, samples: Batch | None, span: Span, loss_scale: float
    ) -> Totals:
        """Passes over this rank's slice, in micro-batches or shards; what they add to the step."""

    @property
    def carries_statistics(self) -> bool:
        """Whether K-FAC's statistics travel with the gradients of this step."""
        return False

    @abstractmethod
    def reduce(self, local: Totals, step: int) -> Totals:
        """Sums over all ranks what travels in a step. Collective."""

    def publish(self, totals: Totals, local: Totals, divisor: int, scale: float) -> bool:
        """Puts the mean gradient into `.grad`; whether this rank has an update to make of it."""
        # Losses were divided by the planned count of samples; bad records make the true one smaller, and
        # some losses have several terms per sample.
        self.vector.publish_gradients(scale * totals.terms / divisor)
        return True

    @property
    def statistics(self) -> Statistics | None:
        """K-FAC's statistics over all ranks, where they came with the gradients."""
        return self.vector.reduced

    def finish_step(self, totals: Totals) -> None:
        """Takes the moving averages of normalisation layers."""
        self.vector.finish_step(totals.count)

    def abort_step(self) -> None:
        """Undoes what a step that failed did to the model."""
        self.vector.abandon_step()

    def committed(self, span: Span, lr: float) -> bool:
        """Notes a committed step; whether `settle` is due now."""
        return False

    # -- between steps ------------------------------------------------------------------------

    def settle(self) -> bool:
        """Gives all ranks one model before it is evaluated or saved; whether it was due. Collective."""
        return False

    def metrics(self) -> dict[str, float]:
        """Columns of a metric row."""
        return {}

    def state_dict(self) -> Any:
        """World-size-free; None where there is none. Collective."""
        return None

    def load_state_dict(self, state: Any) -> None:  # noqa: B027 (optional)
        """Continues from `state_dict()`.

        Raises:
            StateError: If the mode cannot keep its promise from this state on.
        """
