"""The KAISA grid (Pauloski et al., SC'21): gradients and factors everywhere, curvature in columns.

    gradients     averaged over all ranks before the step (by DDP, or by the trainer)
    statistics    all-reduce of sums and counts ──────────────▶ factors on every rank
    decomposing   a column of P owns a layer; one or two of its ranks decompose A and G
                  └─ broadcast inside the column ─────────────▶ its gradient workers
    gradients     each gradient worker preconditions the layer
                  └─ broadcast along the row ─────────────────▶ every rank

Statistics travel as sums and counts, never as means of means, so any shares of any number of ranks give
the mean over the global batch. Collectives are issued in one order on all ranks and waited for at first
use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator, Work
from elastic_kfac.communication.packing import Bucketer
from elastic_kfac.errors import CommunicationError, NumericalError
from elastic_kfac.kfac.distribution.strategy import Distribution, Gradients, Item, Slot, States
from elastic_kfac.kfac.shapes import layer_shape, plan_of
from elastic_kfac.kfac.statistics import Captured, Coming, Statistics, arrived, reduced
from elastic_kfac.placement.plan import Plan


class KaisaGrid(Distribution):
    """Rank r stands in column r mod P of the plan's grid."""

    def join(
        self,
        communicator: Communicator,
        previous: Plan | None = None,
        previous_ranks: Sequence[int | None] | None = None,
    ) -> None:
        self.communicator, self.rank = communicator, communicator.rank
        self.plan = plan_of(
            [layer_shape(layer) for layer in self.layers],
            communicator.world_size,
            self.options,
            calibration=self.calibration,
            memory_budget_bytes=self.options.memory_budget_bytes,
            element_bytes=self.layers[0].dtype.itemsize,
            device_type=self.layers[0].device.type,
            previous=previous,
            previous_ranks=previous_ranks,
        )
        self.require_agreement({}, tag="kfac/agree")
        self._arriving: dict[int, Work] = {}  # decompositions under way, waited for at first use
        self._last: dict[int, Mapping[str, Tensor]] = {}
        """Until what is under way has arrived: what a survivor goes on from."""
        self._lost: set[int] = set()  # layers whose decomposition a lost peer kept from arriving
        self._workers: list[Communicator | None] = []
        self._receivers: list[Communicator | None] = []
        for layer in self.layers:
            # Creating a group is collective over all ranks, members or not.
            self._workers.append(self._group(self.plan.worker_group(layer.name)))
            groups = [self._group(ranks) for ranks in self.plan.receiver_groups(layer.name)]
            self._receivers.append(next((group for group in groups if group is not None), None))

    def _group(self, ranks: Sequence[int]) -> Communicator | None:
        return self.communicator.subgroup(ranks) if len(ranks) > 1 else None

    # -- roles ----------------------------------------------------------------------------------

    def _is_worker(self, index: int) -> bool:
        return self.plan.is_gradient_worker(self.layers[index].name, self.rank)

    def decider(self, index: int) -> int:
        return self.plan.placement(self.layers[index].name).a_worker

    def decomposes(self, index: int) -> tuple[str, ...]:
        names = self.layers[index].factor_names
        placement = self.plan.placement(self.layers[index].name)
        owners = {"F": placement.a_worker, "A": placement.a_worker, "G": placement.g_worker}
        return tuple(name for name in names if owners[name] == self.rank)

    def keeps(self, item: Item, rank: int) -> bool:
        if item.kind in ("factors", "step"):
            return True
        if item.kind == "snapshots":
            return rank == self.plan.placement(item.name).a_worker
        return self.plan.is_gradient_worker(item.name, rank)

    def preconditioned_here(self, states: States) -> list[int]:
        return [
            index
            for index, layer in enumerate(self.layers)
            if states[index].inverse_step >= 0 and layer.has_gradient()
        ]

    # -- statistics -----------------------------------------------------------------------------

    def begin_reduction(self, captured: Captured) -> Coming:
        own = captured.statistics()
        held = [tensor for sums in own.sums for tensor in sums.values()]
        if self.communicator.world_size == 1:
            return Coming(lambda: own, held)
        totals = torch.tensor(captured.facts, dtype=torch.float64, device=self.layers[0].device)
        counting = self.communicator.all_reduce(totals, tag="kfac/counts", async_op=True)
        bucketer = self.bucketer("kfac/factors")
        for layer, sums in zip(self.layers, own.sums, strict=True):
            for name, tensor in sums.items():
                symmetric = self.options.symmetry_aware and not layer.is_diagonal(name)
                bucketer.all_reduce(tensor, symmetric=symmetric)
        summing = bucketer.flush()

        def finish() -> Statistics:
            facts = arrived(totals, counting)
            summing.wait()
            return replace(reduced(facts), sums=own.sums)

        return Coming(finish, held)

    # -- decompositions -------------------------------------------------------------------------

    def share(
        self, states: States, indices: Sequence[int], last: Mapping[int, Mapping[str, Tensor]]
    ) -> None:
        """Inverse workers send new decompositions to the other gradient workers of their column.

        A peer that is lost from here on costs no step: what does not arrive is noticed by
        `precondition`, and every gradient worker holds the factors to decompose it itself.
        """
        self._last = dict(last)
        try:
            self._send(states, indices)
        except CommunicationError:
            self._lost |= {index for index in indices if self._workers[index] is not None}
            self._lost |= self._arriving.keys()
            self._arriving = {}

    def _send(self, states: States, indices: Sequence[int]) -> None:
        bucketers: dict[tuple[int, ...], Bucketer] = {}
        sent: dict[tuple[int, ...], list[int]] = {}
        for index in indices:
            group, layer, state = self._workers[index], self.layers[index], states[index]
            if group is None:
                continue
            ranks = self.plan.worker_group(layer.name)
            bucketer = bucketers.setdefault(ranks, self.bucketer("kfac/second_order", group))
            sent.setdefault(ranks, []).append(index)
            placement = self.plan.placement(layer.name)
            tensors = dict(state.decomposition)
            for name, shape in layer.decomposition_shapes.items():
                owner = placement.g_worker if name.startswith("G_") else placement.a_worker
                if name not in tensors or (layer.continues and owner != self.rank):
                    tensors[name] = torch.empty(shape, dtype=layer.dtype, device=layer.device)
                symmetric = self.options.symmetry_aware and name in ("A_inverse", "G_inverse")
                bucketer.broadcast(
                    tensors[name],
                    group.members.index(owner),
                    symmetric=symmetric and not layer.is_diagonal(name[0]),
                )
            states[index] = replace(state, decomposition=tensors)
        for ranks, bucketer in bucketers.items():
            self._arriving.update(dict.fromkeys(sent[ranks], bucketer.flush()))

    def leave(self) -> set[int]:
        lost = self._lost | self._arriving.keys()
        self._workers = self._receivers = [None] * len(self.layers)
        self._arriving, self._lost = {}, set()
        return super().leave() | lost

    def _receive(self, index: int) -> bool:
        """Whether a layer has its decomposition, once what was under way has arrived."""
        work = self._arriving.pop(index, None)
        if work is not None:
            try:
                work.wait()
            except CommunicationError:
                # One buffer carries the decompositions of several layers.
                shared = {other for other, its in self._arriving.items() if its is work}
                self._lost |= {index, *shared}
                for other in shared:
                    del self._arriving[other]
        return index not in self._lost

    # -- gradients ------------------------------------------------------------------------------

    def precondition(self, states: States, gradients: Gradients, damping: float) -> list[Tensor]:
        indices, values, used = gradients
        results: list[Tensor] = [torch.empty(0)] * len(indices)
        bucketers: dict[tuple[int, ...], Bucketer] = {}
        whole: list[int] = []
        own = [place for place, index in enumerate(indices) if self._is_worker(index)]
        for place in own:
            if not self._receive(indices[place]):
                self._decompose_alone(states, indices[place], damping)
        self._last = {}
        preconditioned = self.stacks.of([indices[place] for place in own]).precondition(
            [states[indices[place]].decomposition for place in own],
            [values[place] for place in own],
            damping,
            [used[place] for place in own],
        )
        for place, value in zip(own, preconditioned, strict=True):
            results[place] = value
        for place in reversed(range(len(indices))):
            index, value = indices[place], results[place]
            layer = self.layers[index]
            if not self._is_worker(index):
                value = torch.empty_like(values[place], memory_format=torch.contiguous_format)
            group, columns = self._receivers[index], used[place]
            if group is not None:
                ranks = self.plan.receiver_group(layer.name, self.rank)
                if columns is not None:  # sizes on the wire must not depend on data
                    value = value.new_zeros(layer.gradient_shape).index_copy_(1, columns, value)
                    whole.append(place)
                value = value.contiguous()
                bucketer = bucketers.setdefault(ranks, self.bucketer("kfac/gradients", group))
                bucketer.broadcast(value, group.members.index(ranks[0]))
            results[place] = value
        works = [bucketer.flush() for bucketer in bucketers.values()]
        for work in works:
            work.wait()
        for place in whole:
            columns = used[place]
            assert columns is not None
            results[place] = results[place].index_select(1, columns)
        return results

    def _decompose_alone(self, states: States, index: int, damping: float) -> None:
        layer, state = self.layers[index], states[index]
        try:
            last = self._last.get(index, {})
            parts = layer.decompose(state.floored, layer.factor_names, damping, last)
        except NumericalError as error:
            raise CommunicationError(f"a peer was lost, and alone: {error}") from error
        states[index] = state.decomposed(parts, state.inverse_step)
        self._lost.discard(index)

    # -- state ----------------------------------------------------------------------------------

    def settle(self) -> None:
        for index in list(self._arriving):
            self._receive(index)
        if self._lost:
            name = self.layers[min(self._lost)].name
            raise CommunicationError(f"no decomposition of {name}: its peer was lost")

    def collect(self, states: States) -> States:
        """Decompositions from one gradient worker each, unless every rank is one."""
        self.settle()
        if len(self.plan.columns) == 1:
            return states
        slots, names = [], []
        for index, layer in enumerate(self.layers):
            if states[index].inverse_step < 0:
                continue
            holder = self.plan.gradient_workers(layer.name)[0]
            like = layer.empty()
            for name, shape in layer.decomposition_shapes.items():
                slots.append(Slot(holder, states[index].decomposition.get(name), shape, like))
                names.append((index, name))
        gathered: list[dict[str, Tensor]] = [{} for _ in self.layers]
        for (index, name), tensor in zip(names, self.from_owners(slots), strict=True):
            gathered[index][name] = tensor
        return [replace(s, decomposition=d) for s, d in zip(states, gathered, strict=True)]
