"""What K-FAC's ranks tell each other: statistics, decompositions, preconditioned gradients.

Follows a `Plan`. Statistics travel as sums and counts, never as means of means, so any shares of any
number of ranks give the mean over the global batch (spec 2.2). Collectives are issued in one order on
all ranks, and waited for at first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_kfac.communication.agreement import require_agreement
from elastic_kfac.communication.collectives import Communicator, Work
from elastic_kfac.communication.packing import Bucketer
from elastic_kfac.curvature.block import Block
from elastic_kfac.curvature.kronecker_block import KroneckerBlock
from elastic_kfac.errors import CommunicationError, NumericalError
from elastic_kfac.kfac.kfac_statistics import Statistics
from elastic_kfac.placement.costs import CostModel, LayerShape, default_costs
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import auto_fraction, make_plan

Moment = Literal["factor_exchange", "factor_update", "decomposition"]


def _nobody_listens(moment: Moment) -> None:
    """Nothing happens."""


def as_communicator(group: dist.ProcessGroup | Communicator | None) -> Communicator:
    """The given ranks; by default those of the default process group, or this process alone."""
    if isinstance(group, Communicator):
        return group
    return Communicator.world() if group is None else Communicator(group)


class Exchange:
    """The communication side of one preconditioner; replaced parts survive `resize`."""

    def __init__(
        self,
        blocks: Sequence[Block],
        communicator: Communicator,
        *,
        grad_worker_frac: float | Literal["auto"],
        inverse_update_steps: int,
        colocate: bool,
        symmetry_aware: bool,
        bucket_mib: float,
        costs: CostModel | None = None,
        memory_budget_bytes: float | None = None,
    ) -> None:
        self.blocks = tuple(blocks)
        self._memory_budget_bytes = memory_budget_bytes
        method = blocks[0].options.method
        self._costs = costs or default_costs("eigen" if method == "eigen" else "inverse")
        self._fraction = grad_worker_frac
        self._interval = inverse_update_steps
        self._colocate = colocate
        self._symmetry_aware = symmetry_aware
        self._bucket_bytes = int(bucket_mib * 2**20)
        self.announce: Callable[[Moment], None] = _nobody_listens
        """Is told right before statistics are exchanged, factors change, decompositions are exchanged."""
        self._join(communicator, previous=None)

    def _join(
        self,
        communicator: Communicator,
        previous: Plan | None,
        previous_ranks: Sequence[int | None] | None = None,
    ) -> None:
        self.communicator = communicator
        shapes = [layer_shape(block) for block in self.blocks]
        fraction = self._fraction
        if fraction == "auto":
            options = self.blocks[0].options
            fraction = auto_fraction(
                shapes,
                communicator.world_size,
                self._interval,
                options.precompute,
                self._memory_budget_bytes,
                method="eigen" if options.method == "eigen" else "inverse",
                element_bytes=self.blocks[0].dtype.itemsize,
                costs=self._costs,
            )
        self.plan = make_plan(
            shapes,
            communicator.world_size,
            fraction,
            colocate=self._colocate,
            costs=self._costs,
            previous=previous,
            previous_ranks=previous_ranks,
        )
        if communicator.world_size > 1:
            self._agree()
        self._arriving: dict[str, Work] = {}  # decompositions under way, waited for at first use
        self._lost: set[str] = set()  # blocks whose decompositions a lost peer kept from arriving
        self._workers: dict[str, Communicator | None] = {}
        self._receivers: dict[str, Communicator | None] = {}
        for block in self.blocks:
            # Creating a group is collective over everybody, members or not.
            self._workers[block.name] = self._group(self.plan.worker_group(block.name))
            mine: Communicator | None = None
            for ranks in self.plan.receiver_groups(block.name):
                group = self._group(ranks)
                mine = group if group is not None else mine
            self._receivers[block.name] = mine

    def _group(self, ranks: Sequence[int]) -> Communicator | None:
        return self.communicator.subgroup(ranks) if len(ranks) > 1 else None

    def _agree(self) -> None:
        """Every rank holds the same model, options and plan, or all raise the same error."""
        options = {f"kfac.{name}": value for name, value in vars(self.blocks[0].options).items()}
        layers = {f"layer {b.name}": (b.gradient_shape, b.dtype) for b in self.blocks}
        require_agreement(
            self.communicator,
            {**options, **layers, "plan": self.plan.sha256},
            what="the K-FAC model and options",
            tag="kfac/agree",
        )

    # -- statistics ----------------------------------------------------------------------------

    def all_finite(self, total: Tensor) -> bool:
        """Whether `total` is finite on every rank."""
        bad = (~torch.isfinite(total)).to(torch.float32)
        self.communicator.all_reduce(bad, tag="kfac/finite").wait()
        return not bool(bad)

    def reduce_statistics(self, own: Statistics) -> Statistics:
        """Adds up sums (in place) and (samples, rows) counts over all ranks."""
        self.announce("factor_exchange")
        if self.communicator.world_size == 1:
            return own
        totals = torch.tensor(own.counts, dtype=torch.float64, device=self.blocks[0].device)
        counting = self.communicator.all_reduce(totals, tag="kfac/counts", async_op=True)
        bucketer = self._bucketer("kfac/factors")
        for block, part in zip(self.blocks, own.sums, strict=True):
            for name, tensor in part.items():
                bucketer.all_reduce(tensor, symmetric=self._is_symmetric(block, name))
        bucketer.flush().wait()
        counting.wait()
        return Statistics(own.sums, [(samples, rows) for samples, rows in totals.tolist()])

    def _is_symmetric(self, block: Block, factor: str) -> bool:
        return self._symmetry_aware and not block.is_diagonal(factor)

    def _bucketer(self, tag: str, communicator: Communicator | None = None) -> Bucketer:
        return Bucketer(communicator or self.communicator, tag=tag, cap_bytes=self._bucket_bytes)

    # -- second order --------------------------------------------------------------------------

    def is_gradient_worker(self, block: Block) -> bool:
        """Whether this rank holds the block's decomposition."""
        return self.plan.is_gradient_worker(block.name, self.communicator.rank)

    def factors_to_decompose(self, block: Block) -> tuple[str, ...]:
        """The factors of a block that this rank decomposes."""
        rank, placement = self.communicator.rank, self.plan.placement(block.name)
        if block.factor_names == ("F",):
            return ("F",) if rank == placement.a_worker else ()
        owners = {"A": placement.a_worker, "G": placement.g_worker}
        return tuple(name for name in block.factor_names if owners[name] == rank)

    def share_second_order(self, due: Sequence[Block]) -> None:
        """Inverse workers send new decompositions to the other gradient workers of their column.

        A peer that is lost from here on costs no step: what does not arrive is found by
        `precondition`, and every gradient worker holds the factors to decompose it itself.
        """
        if due:
            self.announce("decomposition")
        try:
            self._send_second_order(due)
        except CommunicationError:
            self._lost |= {block.name for block in due if self._workers[block.name] is not None}
            self._lost |= self._arriving.keys()
            self._arriving = {}

    def _send_second_order(self, due: Sequence[Block]) -> None:
        bucketers: dict[tuple[int, ...], Bucketer] = {}
        names: dict[tuple[int, ...], list[str]] = {}
        for block in due:
            group = self._workers[block.name]
            if group is None:
                continue
            ranks = self.plan.worker_group(block.name)
            bucketer = bucketers.setdefault(
                ranks, self._bucketer("kfac/second_order", communicator=group)
            )
            names.setdefault(ranks, []).append(block.name)
            placement = self.plan.placement(block.name)
            for name, shape in block.second_order_shapes.items():
                owner = placement.g_worker if name.startswith("G_") else placement.a_worker
                tensor = block.second_order.get(name)
                if tensor is None:
                    tensor = torch.empty(shape, dtype=block.dtype, device=block.device)
                    block.second_order[name] = tensor
                symmetric = self._symmetry_aware and name in ("A_inverse", "G_inverse")
                bucketer.broadcast(
                    tensor,
                    group.members.index(owner),
                    symmetric=symmetric and not block.is_diagonal(name[0]),
                )
        for ranks, bucketer in bucketers.items():
            work = bucketer.flush()
            self._arriving.update(dict.fromkeys(names[ranks], work))

    def settle(self) -> None:
        """Waits for everything under way.

        Raises:
            CommunicationError: If something will not arrive any more.
        """
        self._receive_all()
        if self._lost:
            raise CommunicationError(f"no decomposition of {min(self._lost)}: its peer was lost")

    def _receive_all(self) -> None:
        for name in list(self._arriving):
            self._receive(name)

    def _receive(self, name: str) -> bool:
        """Whether a block has its decomposition, once what was under way has arrived."""
        work = self._arriving.pop(name, None)
        if work is not None:
            try:
                work.wait()
            except CommunicationError:
                # One buffer carries the decompositions of several blocks.
                shared = {other for other, its in self._arriving.items() if its is work}
                self._lost |= {name, *shared}
                for other in shared:
                    del self._arriving[other]
        return name not in self._lost

    # -- gradients -----------------------------------------------------------------------------

    def precondition(
        self,
        blocks: Sequence[Block],
        gradients: Sequence[Tensor],
        damping: float,
    ) -> list[Tensor]:
        """P of every block on every rank: computed by its gradient workers, received by the others."""
        rank = self.communicator.rank
        results: list[Tensor | None] = [None] * len(blocks)
        bucketers: dict[tuple[int, ...], Bucketer] = {}
        for index in reversed(range(len(blocks))):
            block = blocks[index]
            if self.is_gradient_worker(block):
                if not self._receive(block.name):
                    self._decompose_alone(block, damping)
                value = block.precondition(gradients[index], damping)
            else:
                value = torch.empty_like(gradients[index], memory_format=torch.contiguous_format)
            group = self._receivers[block.name]
            if group is not None:
                ranks = self.plan.receiver_group(block.name, rank)
                value = value.contiguous()
                bucketer = bucketers.setdefault(
                    ranks, self._bucketer("kfac/gradients", communicator=group)
                )
                bucketer.broadcast(value, group.members.index(ranks[0]))
            results[index] = value
        works: list[Work] = [bucketer.flush() for bucketer in bucketers.values()]
        for work in works:
            work.wait()
        return [value for value in results if value is not None]

    def _decompose_alone(self, block: Block, damping: float) -> None:
        try:
            block.second_order.update(block.decompose(block.factor_names, damping))
        except NumericalError as error:
            raise CommunicationError(f"a peer was lost, and alone: {error}") from error
        self._lost.discard(block.name)

    # -- state and resizing --------------------------------------------------------------------

    def gather_second_order(self) -> list[dict[str, Tensor]]:
        """Every block's decomposition on every rank (collective where a rank lacks one)."""
        self.settle()
        if len(self.plan.columns) == 1:
            return [block.second_order for block in self.blocks]
        result: list[dict[str, Tensor]] = []
        bucketer = self._bucketer("kfac/state")
        for block in self.blocks:
            holder = self.plan.gradient_workers(block.name)[0]
            tensors = self._own_or_empty(block, block.inverse_step >= 0)
            for tensor in tensors.values():
                bucketer.broadcast(tensor, holder)
            result.append(tensors)
        bucketer.flush().wait()
        return result

    def _own_or_empty(self, block: Block, exists: bool) -> dict[str, Tensor]:
        if not exists:
            return {}
        return {
            name: block.second_order[name].clone()
            if name in block.second_order
            else torch.empty(shape, dtype=block.dtype, device=block.device)
            for name, shape in block.second_order_shapes.items()
        }

    def resize(self, communicator: Communicator, counters: Mapping[str, int]) -> dict[str, Any]:
        """Moves to another set of ranks; returns the counters of the ranks that went furthest."""
        self._receive_all()
        report = {
            "counters": dict(counters),
            "plan": self.plan.to_dict(),
            "rank": self.communicator.rank,
            "factors": [block.factor_updates for block in self.blocks],
            "held": [
                block.inverse_step
                if len(block.second_order) == len(block.second_order_shapes)
                and block.name not in self._lost
                else -1
                for block in self.blocks
            ],
            "ages": [block.inverse_step for block in self.blocks],
        }
        everybody = communicator.all_gather_object(report, tag="kfac/resize")
        leader = max(
            range(len(everybody)),
            key=lambda rank: (everybody[rank]["counters"].get("steps", 0), -rank),
        )
        newest = everybody[leader]
        # What moves is counted from where things are: at the ranks of the leader's plan. A newcomer
        # has a plan of its own making, and no decomposition to keep.
        previous_ranks = [
            other["rank"]
            if other["plan"] == newest["plan"] and any(h >= 0 for h in other["held"])
            else None
            for other in everybody
        ]
        self._join(communicator, Plan.from_dict(newest["plan"]), previous_ranks)
        bucketer = self._bucketer("kfac/resize")
        for index, block in enumerate(self.blocks):
            age = newest["ages"][index]
            updates = newest["factors"][index]
            if updates and any(other["factors"][index] != updates for other in everybody):
                self._spread_factors(block, leader, bucketer, updates)
            block.factor_updates = updates
            block.inverse_step = age
            holders = [r for r, other in enumerate(everybody) if other["held"][index] == age]
            needed = self.plan.gradient_workers(block.name)
            if age < 0:
                block.second_order = {}
            elif holders and any(rank not in holders for rank in needed):
                tensors = self._own_or_empty(block, True)
                for tensor in tensors.values():
                    bucketer.broadcast(tensor, holders[0])
                block.second_order = tensors
            elif not holders:
                block.second_order = {}
                block.inverse_step = -1  # lost with its holders: decomposed again at the next step
        bucketer.flush().wait()
        for block in self.blocks:
            if not self.is_gradient_worker(block):
                block.second_order = {}
        return dict(newest["counters"])

    def _spread_factors(self, block: Block, source: int, bucketer: Bucketer, updates: int) -> None:
        for name, shape in block.factor_shapes.items():
            tensor = block.factors.get(name)
            if tensor is None or self.communicator.rank != source:
                tensor = torch.empty(shape, dtype=block.dtype, device=block.device)
            block.factors[name] = tensor
            bucketer.broadcast(tensor, source)


def layer_shape(block: Block) -> LayerShape:
    """The sizes that placement needs to know."""
    weights = 1
    for size in block.gradient_shape:
        weights *= size
    if isinstance(block, KroneckerBlock):
        a = 0 if block.is_diagonal("A") else block.a_dim
        return LayerShape(block.name, a, block.g_dim, weights, block.groups)
    full = len(block.gradient_shape) == 1 and not block.is_diagonal("F")
    return LayerShape(block.name, 0, weights if full else 0, weights)
