"""The interface of a distribution strategy, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic_kfac.communication.agreement import require_agreement
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.packing import Bucketer
from elastic_kfac.config.kfac import ScriptOptions
from elastic_kfac.curvature.dtensors import local
from elastic_kfac.curvature.layer import Layer, LayerState
from elastic_kfac.curvature.stacks import StackTable
from elastic_kfac.errors import StateError
from elastic_kfac.kfac.options import Rates
from elastic_kfac.kfac.statistics import Captured, Coming, Statistics
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.simulator import Calibration

States = list[LayerState]


def as_communicator(group: dist.ProcessGroup | Communicator | None) -> Communicator:
    """The given ranks; by default those of the default process group, or this process alone."""
    if isinstance(group, Communicator):
        return group
    return Communicator.world() if group is None else Communicator(group)


class Item(NamedTuple):
    """Part of the state that ranks keep as a whole and can hand to each other."""

    kind: str
    """`factors`, `decomposition`, `snapshots`, `step` or `velocity`."""
    name: str
    """Of the layer, or of the parameter."""


class Slot(NamedTuple):
    """A tensor that one rank has and all are to get."""

    owner: int
    own: Tensor | None
    shape: Sequence[int]
    like: Tensor
    """Device and dtype."""


class Gradients(NamedTuple):
    """D of layers in matrix layout."""

    indices: Sequence[int]
    """Of the layers."""
    values: Sequence[Tensor]
    used: Sequence[Tensor | None]
    """The columns that a value holds; None for all."""


class Basis(NamedTuple):
    """What every strategy is built on."""

    layers: Sequence[Layer]
    communicator: Communicator
    options: ScriptOptions
    calibration: Calibration | None
    """What plans are made from; None stands for stored costs."""


class Distribution(ABC):
    """Who decomposes, preconditions and keeps what, and how it travels.

    Collective methods are called by all ranks in the same order. Strategies replace entries of the
    `states` they are given; layers are named by their index.
    """

    sums_gradients: ClassVar[bool] = False
    """Whether gradients come in local and are summed here, with the statistics."""
    counts_are_local: ClassVar[bool] = False
    """Whether a rank counts events (discarded statistics, failures) of its own layers only."""
    updates_weights = False
    """Whether `publish` leaves updated weights, so that no optimizer step must follow."""

    communicator: Communicator
    rank: int
    """This rank's number in `plan`, also after `leave`."""
    plan: Plan

    def __init__(self, basis: Basis) -> None:
        self.layers, self.options = tuple(basis.layers), basis.options
        self.calibration = basis.calibration
        self.stacks = StackTable(self.layers)
        self.join(basis.communicator)

    @abstractmethod
    def join(
        self,
        communicator: Communicator,
        previous: Plan | None = None,
        previous_ranks: Sequence[int | None] | None = None,
    ) -> None:
        """Becomes a member of these ranks under a new plan, the one that moves least from `previous`.

        Collective.
        """

    # -- roles ----------------------------------------------------------------------------------

    @abstractmethod
    def decider(self, index: int) -> int:
        """The rank that chooses refresh intervals of a layer and keeps its snapshots."""

    @abstractmethod
    def decomposes(self, index: int) -> tuple[str, ...]:
        """The factors of a layer that this rank decomposes."""

    @abstractmethod
    def keeps(self, item: Item, rank: int) -> bool:
        """Whether `rank` keeps a part of the state under the present plan."""

    @abstractmethod
    def preconditioned_here(self, states: States) -> list[int]:
        """Layers whose preconditioned gradients this rank will have."""

    # -- one step -------------------------------------------------------------------------------

    @abstractmethod
    def begin_reduction(self, captured: Captured) -> Coming:
        """Starts to sum statistics over all ranks (and gradients, with `sums_gradients`). Collective."""

    def reduce(self, captured: Captured) -> Statistics:
        """The sums of `begin_reduction`. Collective."""
        return self.begin_reduction(captured).wait()

    def bring(self) -> None:  # noqa: B027 (optional)
        """Brings whole gradients, into `.grad`, to the ranks that precondition them, where ranks hold
        pieces. Collective."""

    def unowned(self, parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
        """Of all parameters, those that no other rank preconditions."""
        return parameters

    def share(  # noqa: B027 (optional)
        self, states: States, indices: Sequence[int], last: Mapping[int, Mapping[str, Tensor]]
    ) -> None:
        """Spreads new decompositions of layers to the ranks that precondition them; `last` has those
        before, of layers that continue them. Collective."""

    @abstractmethod
    def precondition(self, states: States, gradients: Gradients, damping: float) -> list[Tensor]:
        """P of layers from D, or from the columns of it that are used. Collective."""

    def total(self, value: Tensor) -> Tensor:
        """The sum over all layers of a scalar that was summed over `preconditioned_here`. Collective."""
        return value

    def publish(self, rates: Rates, step: int) -> None:  # noqa: B027 (optional)
        """Brings preconditioned gradients, now in `.grad`, to every rank. Collective."""

    # -- state ----------------------------------------------------------------------------------

    def leave(self) -> set[int]:
        """Drops every reference to process groups and to work under way; `join` must follow.

        Returns the layers whose decomposition was under way and is lost.
        """
        self.communicator = Communicator.solo()
        return set()

    def settle(self) -> None:  # noqa: B027 (optional)
        """Waits for decompositions that are under way.

        Raises:
            CommunicationError: If one was lost with a peer.
        """

    @abstractmethod
    def collect(self, states: States) -> States:
        """All states, whole, on every rank. Collective."""

    def held(self) -> dict[Item, dict[str, Tensor]]:
        """State of this rank other than that of layers."""
        return {}

    def take(self, items: Mapping[Item, Mapping[str, Tensor]]) -> None:  # noqa: B027 (optional)
        """Replaces what `held` returned."""

    def collect_velocity(self) -> dict[str, Tensor]:
        """Momentum of every parameter on every rank; empty where there is none. Collective."""
        return {}

    def restore_velocity(self, saved: Mapping[str, Tensor]) -> None:
        """Keeps this rank's part of saved momentum.

        Raises:
            StateError: If there is momentum and this strategy keeps none.
        """
        if saved:
            raise StateError(
                "the K-FAC state was saved with sharded.gather=weights: it holds momentum",
                allowed="a KFAC that applies the update itself",
                change="set optimizer.name=sharded_kfac and sharded.gather=weights",
            )

    # -- for the strategies ---------------------------------------------------------------------

    def all_finite(self, gradients: Iterable[Tensor]) -> bool:
        """Whether the sums of gradients, or of pieces of them, are finite on every rank. Collective."""
        zero = torch.zeros((), device=self.layers[0].device)
        total = torch.stack([zero, *(local(g).sum().float() for g in gradients)]).sum()
        bad = (~torch.isfinite(total)).to(torch.float32)
        self.communicator.all_reduce(bad, tag="kfac/finite").wait()
        return not bool(bad)

    def from_owners(self, slots: Iterable[Slot]) -> list[Tensor]:
        """Every tensor on every rank. Collective."""
        bucketer = self.bucketer("kfac/state")
        tensors = []
        for owner, own, shape, like in slots:
            tensor = torch.zeros(shape, dtype=like.dtype, device=like.device)
            if own is not None and owner == self.rank:
                tensor.copy_(own)
            bucketer.broadcast(tensor, owner)
            tensors.append(tensor)
        bucketer.flush().wait()
        return tensors

    def bucketer(self, tag: str, communicator: Communicator | None = None) -> Bucketer:
        """Joins small tensors of one communicator into buckets."""
        cap_bytes = int(self.options.bucket_mib * 2**20)
        return Bucketer(communicator or self.communicator, tag=tag, cap_bytes=cap_bytes)

    def require_agreement(self, facts: Mapping[str, object], tag: str) -> None:
        """Raises the same error on all ranks unless they have the same model, options and plan."""
        if self.communicator.world_size > 1:
            require_agreement(
                self.communicator,
                {
                    **{f"kfac.{name}": getattr(self.options, name) for name in _AGREED},
                    **{f"layer {x.name}": (x.gradient_shape, x.dtype) for x in self.layers},
                    **facts,
                    "plan": self.plan.sha256,
                },
                what="the K-FAC model and options",
                tag=tag,
            )


_AGREED = (
    "method",
    "inverse_damping",
    "max_factor_dim",
    "factor_rank",
    "factor_scale",
    "weight_sharing",
    "bn_fisher",
    "bn_damping_multiplier",
    "precompute",
    "ema_init",
    "refresh",
    "overlap_reduction",
)
